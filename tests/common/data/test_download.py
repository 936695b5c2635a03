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
from __future__ import annotations

from pathlib import Path
from typing import Any

import monai.apps
import pytest

from common.data.download import cache_folder, download_dataset


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What MONAI's downloader was asked for; it unpacks an empty data set."""
    calls: list[dict[str, Any]] = []

    def pretend(**arguments: Any) -> None:
        calls.append(arguments)
        (arguments["output_dir"] / "Task04_Hippocampus/imagesTr").mkdir(parents=True)

    monkeypatch.setattr(monai.apps, "download_and_extract", pretend)
    return calls


def test_it_is_fetched_once_with_a_checksum(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    for _ in range(2):
        assert download_dataset("hippocampus", tmp_path / "new") == tmp_path / "new/Task04_Hippocampus"
    (call,) = asked
    assert call["url"].endswith("Task04_Hippocampus.tar")
    assert call["hash_val"] == monai.apps.DecathlonDataset.md5["Task04_Hippocampus"]


def test_what_is_there_is_not_fetched(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    (tmp_path / "imagesTr").mkdir()
    assert download_dataset("hippocampus", tmp_path) == tmp_path
    assert not asked


def test_data_under_an_agreement_are_not_fetched(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="only 'hippocampus' can be downloaded, not 'oasis'"):
        download_dataset("oasis", tmp_path)
    assert not asked


def test_the_cache_folder_follows_the_users_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "warpzoo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/warpzoo"
