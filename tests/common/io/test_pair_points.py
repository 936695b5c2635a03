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

import numpy as np
import pytest

from common.io import Scan, load_image, load_pair_points, save_image
from common.io.points import PointsError

# Far from the origin, so that RAS, LPS and voxels are told apart; oblique and sheared.
AFFINES = {
    2: np.array([[1.1, 0.3, 60.0], [-0.4, 0.9, 80.0], [0, 0, 1]]),
    3: np.array([[0.2, -1.4, 0.1, 60.0], [-0.1, 0.2, 1.9, 80.0], [1.2, 0.1, 0, -90.0], [0, 0, 0, 1]]),
}
VOXELS = {2: np.array([[1.0, 2.5], [7, 8], [3, 0]]), 3: np.array([[1.0, 2.5, 3], [7, 8, 4], [3, 0, 5]])}


def scans(folder: Path, dims: int) -> dict[str, Scan]:
    shape = (8, 9, 6)[:dims]
    for role in ("moving", "fixed"):
        save_image(folder / f"{role}.nii", np.zeros(shape, np.float32), AFFINES[dims])
    return {role: load_image(folder / f"{role}.nii") for role in ("moving", "fixed")}


def written(path: Path, points: np.ndarray, header: bool = True) -> str:
    names = ",".join("xyz"[: points.shape[1]])
    np.savetxt(path, points, delimiter=",", header=names if header else "", comments="")
    return str(path)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("header", [True, False])
def test_all_spaces_are_one(tmp_path: Path, dims: int, header: bool) -> None:
    ras = VOXELS[dims] @ AFFINES[dims][:-1, :-1].T + AFFINES[dims][:-1, -1]
    lps = ras * np.array([-1, -1, 1])[:dims]
    for space, points in (("voxel", VOXELS[dims]), ("ras", ras), ("lps", lps)):
        files = {
            role: written(tmp_path / f"{role}.csv", rows, header)
            for role, rows in (("moving", points), ("fixed", points[::-1]))
        }
        found, notes = load_pair_points(files, scans(tmp_path, dims), space)
        assert notes == []
        np.testing.assert_allclose(found["moving"], ras, atol=1e-4)
        np.testing.assert_allclose(found["fixed"], ras[::-1], atol=1e-4)


@pytest.mark.parametrize("given", ["ras", "lps", "voxel"])
@pytest.mark.parametrize("meant", ["ras", "lps", "voxel"])
def test_points_outside_of_their_scan_say_where_they_would_be_inside(tmp_path: Path, given: str, meant: str) -> None:
    ras = VOXELS[3] @ AFFINES[3][:-1, :-1].T + AFFINES[3][:-1, -1]
    points = {"ras": ras, "lps": ras * [-1, -1, 1], "voxel": VOXELS[3]}
    files = {"moving": written(tmp_path / "m.csv", points[meant]), "fixed": written(tmp_path / "f.csv", points[given])}
    _, notes = load_pair_points(files, scans(tmp_path, 3), given)
    if given == meant:
        assert notes == []
        return
    (note,) = notes
    assert note.startswith("100% of the points in ") and "m.csv lie outside of " in note and "moving.nii as " in note
    assert note.endswith(f"100% lie in it: is --points_space {meant} meant?")


def test_points_that_lie_in_no_space_and_few_that_lie_outside(tmp_path: Path) -> None:
    far = np.full((4, 3), 1e4)
    files = {role: written(tmp_path / f"{role}.csv", far) for role in ("moving", "fixed")}
    _, notes = load_pair_points(files, scans(tmp_path, 3))
    assert len(notes) == 2 and all("in no other space do most of them lie in it" in note for note in notes)
    most = np.concatenate([VOXELS[3], far[:2]])
    files = {role: written(tmp_path / f"{role}.csv", most) for role in ("moving", "fixed")}
    assert load_pair_points(files, scans(tmp_path, 3), "voxel")[1] == []


def test_what_are_no_partners_is_refused(tmp_path: Path) -> None:
    both = scans(tmp_path, 2)
    three, two = written(tmp_path / "three.csv", VOXELS[2]), written(tmp_path / "two.csv", VOXELS[2][:2])
    with pytest.raises(PointsError, match=r"three.csv has 3 points but .*two.csv has 2 points: row k of one"):
        load_pair_points({"moving": three, "fixed": two}, both)
    with pytest.raises(PointsError, match=r"two.csv has no partner: landmarks need a file of the moving scan too"):
        load_pair_points({"fixed": two}, both)
    (tmp_path / "none.csv").write_text("x,y\n")
    with pytest.raises(PointsError, match=r"none.csv has 0 points, expected one or more"):
        load_pair_points({"moving": tmp_path / "none.csv", "fixed": tmp_path / "none.csv"}, both)
    (tmp_path / "text.csv").write_text("x,y\n1,2\n3,nan\n")
    with pytest.raises(PointsError, match=r"text.csv, row 3: expected a finite number"):
        load_pair_points({"moving": tmp_path / "text.csv", "fixed": two}, both)
    with pytest.raises(PointsError, match=r"two.csv has the columns|finite number"):
        load_pair_points({"moving": two, "fixed": two}, scans(tmp_path, 3))
    with pytest.raises(FileNotFoundError, match=r"no points at .*gone.csv"):
        load_pair_points({"moving": tmp_path / "gone.csv", "fixed": two}, both)
    with pytest.raises(ValueError, match="unknown space 'mni'"):
        load_pair_points({"moving": two, "fixed": two}, both, "mni")
