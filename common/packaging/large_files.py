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
"""Files that are too large for a Model Zoo zip: MONAI fetches them by ``large_files.yml``.

A bundle whose file exceeds 25 MB has a ``large_files.yml`` in its folder, of the Model Zoo's form::

    large_files:
    - path: "models/model.pt"
      url: "https://..."

The file itself stays out of the zip; ``large_files.yml`` goes in, with the file's sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["LARGE_FILES", "LIMIT", "take_large_files"]

LARGE_FILES = "large_files.yml"
LIMIT = 25_000_000


def take_large_files(folder: Path, files: Mapping[str, Path]) -> tuple[dict[str, bytes], list[str]]:
    """Read what a zip holds, and list what is too large for it.

    Args:
        folder: of the bundle, where ``large_files.yml`` says from where large files are fetched.
        files: path by path within the zip.

    Returns:
        the contents, with ``large_files.yml`` where it is needed, and the paths of the files that it lists.

    Raises:
        ValueError: for a large file without a URL, and for a hash that is not the file's.
    """
    stated = _stated(folder / LARGE_FILES)
    contents, large = {}, []
    for name, path in files.items():
        size = path.stat().st_size
        if size <= LIMIT:
            contents[name] = path.read_bytes()
        elif name not in stated:
            raise ValueError(
                f"{path} has {size:,} bytes, a zip's files at most {LIMIT:,}: `{LARGE_FILES}` in {folder} has to give "
                f"a `url` for the path '{name}', and lists {sorted(stated)}"
            )
        else:
            large.append(_with_hash(stated[name], path))
    # What is not in the checkout at all, since it is large, is fetched by the hash that is stated.
    large += [_complete(entry, folder) for name, entry in stated.items() if name not in files]
    if large:
        contents[LARGE_FILES] = _text(large).encode()
    return contents, [entry["path"] for entry in large]


def _stated(path: Path) -> dict[str, dict[str, str]]:
    """The entries of ``large_files.yml`` by path, none where there is no such file."""
    if not path.is_file():
        return {}
    from monai.bundle import ConfigParser

    content: Any = ConfigParser.load_config_file(str(path))
    entries = content.get("large_files") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry.get("path") for entry in entries):
        raise ValueError(f"{path}: expected a list `large_files` of entries with `path` and `url`, found {content}")
    for entry in entries:
        if not entry.get("url"):
            raise ValueError(f"{path}: '{entry['path']}' has no `url`")
    return {str(entry["path"]): {key: str(value) for key, value in entry.items()} for entry in entries}


def _with_hash(entry: dict[str, str], path: Path) -> dict[str, str]:
    """An entry with the hash of the file that lies there."""
    kind = entry.get("hash_type") or "sha256"
    found = hashlib.new(kind, path.read_bytes()).hexdigest()
    stated = entry.get("hash_val") or found
    if stated != found:
        raise ValueError(f"{path}: its {kind} is {found}, `{LARGE_FILES}` has {stated}")
    return {**entry, "hash_val": found, "hash_type": kind}


def _complete(entry: dict[str, str], folder: Path) -> dict[str, str]:
    """An entry of a file that is not here."""
    if not entry.get("hash_val") or not entry.get("hash_type"):
        raise ValueError(
            f"{folder / LARGE_FILES}: '{entry['path']}' is not here, so `hash_val` and `hash_type` are needed"
        )
    return entry


def _text(entries: list[dict[str, str]]) -> str:
    """YAML in the Model Zoo's form."""
    lines = ["large_files:"]
    for entry in sorted(entries, key=lambda entry: entry["path"]):
        lines += [f'- path: "{entry["path"]}"']
        lines += [f'  {key}: "{entry[key]}"' for key in ("url", "hash_val", "hash_type")]
    return "\n".join(lines) + "\n"
