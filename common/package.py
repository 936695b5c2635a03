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
"""Pack a bundle of this checkout, or all of them, for a Model Zoo or for somebody else's machine.

``python -m common.package ssl_pretrain`` writes ``dist/ssl_pretrain_v0.1.0.zip``; ``all`` packs every bundle. The zip
holds the bundle's folder with ``common/``, ``data_splits/`` and a list of contents, ``sha256.txt``, and always has the
same bytes. ``python -m monai.bundle download --name ssl_pretrain --url file:///...`` unpacks it.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from pathlib import Path

from common.packaging import build_zip, bundle_names

logger = logging.getLogger(__name__)


def package(bundle: str, output: str = "dist") -> None:
    """Write the zip of a bundle and log its name, size and sha256.

    Args:
        bundle: its name, or ``all``.
        output: folder of the zips.

    Raises:
        ValueError: when this is no checkout, or the bundle is not fit to be shipped.
        FileNotFoundError: names a file that the bundle lacks.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "bundles").is_dir():
        raise ValueError(f"{root} has no folder `bundles`: zips are made in a checkout, of the core that lies there")
    for name in bundle_names(root) if bundle == "all" else [bundle]:
        path = build_zip(root, name, output)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        logger.info("%s  %d bytes  sha256 %s", path, path.stat().st_size, digest)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    fire.Fire(package)
