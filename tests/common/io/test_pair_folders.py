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

import json
import math
from pathlib import Path
from typing import Any

from common.io import PairFolders

PAIR: dict[str, Any] = {"id": "a_to_b", "moving": "/a.nii", "fixed": "/b.nii", "moving_id": "a"}


def test_a_folder_is_complete_once_finished_for_the_same_files(tmp_path: Path) -> None:
    folders = PairFolders(tmp_path)
    assert not folders.complete(PAIR)
    folders.finish(PAIR, {"ndv": [0.5]})
    assert folders.complete(PAIR) and folders.complete({**PAIR, "moving_id": "other"})
    assert not folders.complete({**PAIR, "moving": "/c.nii"})
    assert not folders.complete({**PAIR, "moving_label": "/l.nii"})
    assert not folders.complete({**PAIR, "moving_frame": 0})
    assert not PairFolders(tmp_path, overwrite=True).complete(PAIR)
    folders.restart("a_to_b")
    folders.restart("a_to_b")
    assert not folders.complete(PAIR)


def test_what_is_half_written_or_something_else_does_not_count(tmp_path: Path) -> None:
    folders = PairFolders(tmp_path)
    folders.finish(PAIR, {"ndv": [0.5]})
    path = tmp_path / "a_to_b/metrics.json"
    whole = path.read_text()
    for text in (whole[:-20], "[]", '{"ndv": [0.5]}', ""):
        path.write_text(text)
        assert not folders.complete(PAIR), text


def test_measures_come_back_with_their_names(tmp_path: Path) -> None:
    folders = PairFolders(tmp_path, columns={"dice": ("3", "7"), "ndv": ("",)})
    folders.finish(PAIR, {"dice": [0.25, math.nan], "ndv": [1.5], "hd": [math.inf]})
    stored = json.loads((tmp_path / "a_to_b/metrics.json").read_text())
    assert stored["dice"] == [0.25, None] and stored["files"] == {"moving": "/a.nii", "fixed": "/b.nii"}
    # Of a run with other labels.
    values, columns = PairFolders(tmp_path, columns={"dice": ("1", "3", "7")}).measures("a_to_b")
    assert columns == {"dice": ["3", "7"]} and values["ndv"] == [1.5] and values["hd"] == [math.inf]
    assert values["dice"][0] == 0.25 and math.isnan(values["dice"][1])
    assert [path.name for path in (tmp_path / "a_to_b").iterdir()] == ["metrics.json"]
