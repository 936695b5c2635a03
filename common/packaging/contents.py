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
"""What a shipped bundle holds, read from a checkout.

The files are told by what they are, not by version control, so that a copy of the tree gives the same zip. Runs, logs,
caches and exported networks are none of them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from common.packaging.documents import adapt_documents
from common.packaging.large_files import LARGE_FILES, take_large_files

__all__ = ["bundle_names", "bundle_version", "gather"]

logger = logging.getLogger(__name__)

_KINDS = {
    "configs": (".json", ".conf"),
    "docs": (".md", ".txt", ".png"),
    "models": (".pt",),
    "scripts": (".py",),
}
_REQUIRED = (
    "LICENSE",
    "configs/metadata.json",
    "configs/train.json",
    "configs/evaluate.json",
    "configs/inference.json",
    "configs/multi_gpu_train.json",
    "configs/logging.conf",
    "docs/README.md",
    "docs/data_license.txt",
    "models/model.pt",
    "scripts/__init__.py",
)
_CACHES = "__pycache__"


def bundle_names(root: Path) -> list[str]:
    """The bundles of a checkout."""
    return sorted(path.parent.name for path in (root / "bundles").glob("*/configs"))


def gather(root: Path, bundle: str) -> dict[str, bytes]:
    """All files of a shipped bundle but their list.

    The core and the dataset lists come along: ``common`` is imported as ``common`` there too, and ``--dataset`` takes
    the name of any list in every bundle.

    Args:
        root: of the checkout.
        bundle: its name, a folder of ``bundles/``.

    Returns:
        content by path within the zip's top folder, in the order of the paths.

    Raises:
        ValueError: for an unknown bundle, a version that the changelog lacks, a broken link, or a large file without
            a URL.
        FileNotFoundError: names the first file that a bundle should have and has not.
    """
    if bundle not in bundle_names(root):
        raise ValueError(f"no bundle '{bundle}' in {root / 'bundles'}: expected one of {bundle_names(root)}")
    folder = root / "bundles" / bundle
    files = {**_files_of(folder), **_core(root), **_dataset_lists(root)}
    contents, listed = take_large_files(folder, files)
    for name in _REQUIRED:
        if name not in files and name not in listed:
            raise FileNotFoundError(
                f"{folder / name} is missing: a bundle that is shipped needs {', '.join(_REQUIRED)}"
            )
    bundle_version(folder)
    contents = adapt_documents(root, bundle, contents)
    return {name: contents[name] for name in sorted(contents)}


def bundle_version(folder: Path) -> str:
    """The version that the metadata of a bundle state.

    Raises:
        ValueError: when it is not of the form 1.2.3, or the changelog does not know it.
    """
    path = folder / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    version, changelog = str(metadata.get("version")), metadata.get("changelog", {})
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"{path}: version is '{version}', expected three numbers such as '0.1.0'")
    if version not in changelog:
        raise ValueError(f"{path}: version is '{version}', of which `changelog` says nothing; it has {list(changelog)}")
    return version


def _files_of(folder: Path) -> dict[str, Path]:
    """The bundle's own files; what else lies about is named in the log."""
    files = {"LICENSE": folder / "LICENSE"} if (folder / "LICENSE").is_file() else {}
    for part, suffixes in _KINDS.items():
        for path in _walk(folder / part):
            if path.suffix in suffixes:
                files[path.relative_to(folder).as_posix()] = path
            else:
                logger.info("left out: %s", path)
    for path in sorted(folder.iterdir()):
        if path.name not in (*_KINDS, "LICENSE", LARGE_FILES, _CACHES):
            logger.info("left out: %s", path)
    return files


def _core(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in _walk(root / "common") if path.suffix == ".py"}


def _dataset_lists(root: Path) -> dict[str, Path]:
    """The lists and what is said of them, without what they are written from."""
    paths = [*sorted((root / "data_splits").glob("*.json")), root / "data_splits" / "README.md"]
    return {path.relative_to(root).as_posix(): path for path in paths}


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder but those of caches and hidden ones, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if path.is_file() and _CACHES not in inner and not any(name.startswith(".") for name in inner):
            yield path
