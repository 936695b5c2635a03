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

import pytest

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


def test_landmarks_and_an_affine_are_of_the_pair(tmp_path: Path) -> None:
    folders = PairFolders(tmp_path)
    points = {"moving_points": "/m.csv", "fixed_points": "/f.csv", "points_space": "ras"}
    folders.finish({**PAIR, **points}, {"tre": [0.5]})
    assert folders.complete({**PAIR, **points}) and not folders.complete(PAIR)
    assert not folders.complete({**PAIR, **points, "points_space": "lps"})
    assert not folders.complete({**PAIR, **points, "affine": "/a.mat"})


SETTINGS: dict[str, Any] = {"refine": 0, "affine": "rigid", "spacing": None, "window": (0, 1.5), "inverse": False}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("refine", 50, "refine 0, now 50"),
        ("affine", "affine", "affine rigid, now affine"),
        ("spacing", 2, "spacing None, now 2"),
        ("window", (0, 2), "window [0, 1.5], now [0, 2]"),
        ("intensity", "mri", "intensity unknown, now mri"),
    ],
)
def test_other_settings_are_another_registration(tmp_path: Path, name: str, value: Any, reason: str) -> None:
    PairFolders(tmp_path, settings=SETTINGS).finish(PAIR, {"ndv": [0.5]}, {"timings": {"load": 1.0}})
    same, other = (PairFolders(tmp_path, settings=each) for each in (SETTINGS, {**SETTINGS, name: value}))
    assert same.complete(PAIR) and same.changed(PAIR) == ""
    assert not other.complete(PAIR) and other.changed(PAIR) == reason
    assert other.measures("a_to_b")[0] == {"ndv": [0.5]}
    # Who does not ask is not told, and other scans are not this pair registered otherwise.
    assert PairFolders(tmp_path).complete(PAIR) and PairFolders(tmp_path).changed(PAIR) == ""
    assert other.changed({**PAIR, "moving": "/c.nii"}) == "" == other.changed({**PAIR, "id": "new"})
    assert json.loads((tmp_path / "a_to_b/metrics.json").read_text())["settings"]["window"] == [0, 1.5]


def test_settings_that_are_not_known_do_not_count(tmp_path: Path) -> None:
    PairFolders(tmp_path).finish(PAIR, {"ndv": [0.5]})
    folders = PairFolders(tmp_path, settings=SETTINGS)
    assert not folders.complete(PAIR) and folders.changed(PAIR) == "settings that it does not name"
    fewer = {name: value for name, value in SETTINGS.items() if name != "refine"}
    folders.finish(PAIR, {"ndv": [0.5]})
    assert PairFolders(tmp_path, settings=fewer).changed(PAIR) == "refine 0, now unknown"


def test_files_count_by_what_they_hold(tmp_path: Path) -> None:
    for folder, text in (("a", "weights"), ("b", "weights"), ("c", "others")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.pt").write_text(text)
    one, copy, other = (PairFolders(tmp_path, settings={"checkpoint": tmp_path / f / "model.pt"}) for f in "abc")
    one.finish(PAIR, {"ndv": [0.5]})
    assert one.settings == {"checkpoint": "model.pt (9a129038d9a0)"}
    assert copy.complete(PAIR) and not other.complete(PAIR)
    assert other.changed(PAIR).startswith("checkpoint model.pt (") and ", now model.pt (" in other.changed(PAIR)
    forth, back = (
        PairFolders(tmp_path, settings={"affine": [f"{tmp_path}/a/model.pt{end}"]}) for end in ("", ":inverse")
    )
    forth.finish(PAIR, {"ndv": [0.5]})
    assert not back.complete(PAIR) and ":inverse (" in back.changed(PAIR)
