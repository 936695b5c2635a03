# Copyright (c) WarpZoo contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Zips that have the same bytes wherever and whenever they are made.

Names are sorted; time, permissions and system are fixed. Nothing is compressed: another zlib gives other bytes, and
what a bundle is large by, weights and pictures, does not shrink.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from common.packaging.contents import bundle_version, gather

__all__ = ["MANIFEST", "build_zip"]

MANIFEST = "sha256.txt"
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can state
_UNIX, _FILE = 3, 0o100644 << 16


def build_zip(root: str | Path, bundle: str, output: str | Path) -> Path:
    """Write ``<bundle>_v<version>.zip``, with one folder ``<bundle>/`` in it.

    Args:
        root: of the checkout.
        bundle: its name.
        output: folder of the zip; made where it is not.

    Returns:
        the path of the zip.

    Raises:
        ValueError, FileNotFoundError: when the bundle is not fit to be shipped, see
            :func:`common.packaging.contents.gather`; no zip is written then.
    """
    root = Path(root)
    contents = gather(root, bundle)
    contents[MANIFEST] = _manifest(contents)
    path = Path(output) / f"{bundle}_v{bundle_version(root / 'bundles' / bundle)}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(contents):
                archive.writestr(_entry(f"{bundle}/{name}"), contents[name])
        os.replace(unfinished, path)
    return path


def _manifest(contents: Mapping[str, bytes]) -> bytes:
    """Lines for ``sha256sum -c``, typed in the bundle's folder."""
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)]
    return "".join(lines).encode()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=_TIME)
    entry.create_system = _UNIX
    entry.external_attr = _FILE
    return entry
