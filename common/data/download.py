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
"""Fetching public data, only when asked to."""

from __future__ import annotations

import logging
import os
from pathlib import Path

__all__ = ["cache_folder", "download_dataset"]

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where data lie that nobody gave a folder for: ``$XDG_CACHE_HOME/warpzoo`` or ``~/.cache/warpzoo``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser() / "warpzoo"


def download_dataset(name: str, dataset_dir: str | Path) -> Path:
    """Fetch a data set with MONAI's own downloader, unless it is already there.

    Args:
        name: ``"hippocampus"``.
        dataset_dir: the folder that has, or will have, ``Task04_Hippocampus``; or that folder itself.

    Returns:
        the folder with ``imagesTr`` and ``labelsTr``.

    Raises:
        ValueError: for a data set that cannot be fetched without an agreement or an account.
    """
    if name != "hippocampus":
        raise ValueError(f"only 'hippocampus' can be downloaded, not '{name}': see the source its JSON names")
    folder = Path(dataset_dir).expanduser()
    if (folder / "imagesTr").is_dir():
        return folder
    task = "Task04_Hippocampus"
    if not (folder / task / "imagesTr").is_dir():
        from monai.apps import DecathlonDataset, download_and_extract

        logger.info("downloading %s to %s", task, folder)
        folder.mkdir(parents=True, exist_ok=True)
        download_and_extract(
            url=DecathlonDataset.resource[task],
            filepath=folder / f"{task}.tar",
            output_dir=folder,
            hash_val=DecathlonDataset.md5[task],
            hash_type="md5",
        )
    return folder / task
