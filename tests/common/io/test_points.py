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
"""Points in CSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.io.points import PointsError, from_ras, load_points, save_points, to_ras
from common.spatial import Grid


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x,y,z\n1,2,3\n4,5,6\n", [[1, 2, 3], [4, 5, 6]]),
        ("1,2,3\n4,5,6\n", [[1, 2, 3], [4, 5, 6]]),
        ("label,Z,Y,X\nnose,3,2,1\n\near,6,5,4\n", [[1, 2, 3], [4, 5, 6]]),
        ("\ufeffx, y, z, t, label\n1.5, -2, 3e1, 0, 7\n", [[1.5, -2, 30]]),
        ("x,y,z\n", np.zeros((0, 3))),
    ],
    ids=["header", "bare numbers", "other order and names", "ANTs with a byte-order mark", "none"],
)
def test_tables_are_read(tmp_path: Path, text: str, expected: list[list[float]]) -> None:
    (tmp_path / "points.csv").write_text(text, encoding="utf-8")
    assert np.array_equal(load_points(tmp_path / "points.csv", 3).coordinates, expected)


def test_all_but_the_coordinates_stays(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,y,x\nleft ear,2,1\n")
    save_points(tmp_path / "b.csv", load_points(tmp_path / "a.csv", 2), np.array([[10.0, 20.5]]))
    assert (tmp_path / "b.csv").read_text() == "name,y,x\nleft ear,20.500000,10.000000\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", r"columns \['a', 'b', 'c'\], expected \['x', 'y', 'z'\] among them"),
        ("x,y,z\n1,2\n", "row 2: expected a finite number"),
        ("x,y,z\n1,2,3\n1,2,nan\n", "row 3: expected a finite number"),
        ("", "holds no points"),
    ],
)
def test_other_tables_are_refused_by_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(PointsError, match=message) as raised:
        load_points(tmp_path / "points.csv", 3)
    assert "points.csv" in str(raised.value)


def test_spaces_by_hand() -> None:
    grid = Grid((5, 5, 5), torch.tensor([[-2.0, 0, 0, 10], [0, 3, 0, 20], [0, 0, 4, 30], [0, 0, 0, 1]]))
    voxel = np.array([[1.0, 2.0, 3.0]])
    assert to_ras(voxel, "voxel", grid).tolist() == [[8.0, 26.0, 42.0]]
    assert to_ras(voxel, "ras").tolist() == [[1.0, 2.0, 3.0]]
    assert to_ras(voxel, "lps").tolist() == [[-1.0, -2.0, 3.0]]
    assert to_ras(voxel[:, :2], "lps").tolist() == [[-1.0, -2.0]]
    for space in ("voxel", "ras", "lps"):
        torch.testing.assert_close(from_ras(to_ras(voxel, space, grid), space, grid), torch.from_numpy(voxel))
    with pytest.raises(ValueError, match="the image whose voxels they are"):
        to_ras(voxel, "voxel")
    with pytest.raises(ValueError, match="unknown space 'mm'"):
        to_ras(voxel, "mm")
