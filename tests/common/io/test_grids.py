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

from common.io import GridError, Scan, grid_difference, require_same_grid, same_grid


def scan(name: str = "a", shape: tuple[int, ...] = (10, 12, 14), affine: np.ndarray | None = None) -> Scan:
    affine = np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine
    return Scan(np.zeros(shape), affine, Path(f"{name}.nii.gz"), affine)


def changed(entry: tuple[int, int], value: float) -> np.ndarray:
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[entry] = value
    return affine


def test_rounding_of_headers_is_forgiven() -> None:
    assert same_grid(scan(), scan("b", affine=changed((0, 3), 1e-3)))
    assert same_grid(scan(), scan("b", affine=np.diag([1.0, 1.0, 2.0, 1.0]).astype(np.float32).astype(float)))


def test_a_small_rotation_counts_where_it_is_large() -> None:
    # 0.002 rad move the corner at index 13 along axis 2 by 0.026 mm, more than a hundredth of the 1 mm voxel.
    assert not same_grid(scan(), scan("b", affine=changed((0, 2), 0.002)))
    assert same_grid(scan(), scan("b", affine=changed((0, 2), 0.002)), tolerance=0.05)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (scan("b", (10, 12, 15)), r"shape \(10, 12, 14\) != \(10, 12, 15\)"),
        (scan("b", (10, 12)), r"shape \(10, 12, 14\) != \(10, 12\)"),
        (scan("b", affine=changed((2, 2), 3.0)), r"spacing \(1.0, 1.0, 2.0\) != \(1.0, 1.0, 3.0\)"),
        (scan("b", affine=changed((0, 0), -1.0)), "orientation RAS != LAS"),
        (scan("b", affine=changed((1, 3), 7.5)), r"origin \(0.0, 0.0, 0.0\) != \(0.0, 7.5, 0.0\).*7.5 mm apart"),
        (scan("b", affine=changed((0, 2), 0.01)), "affine"),
    ],
)
def test_the_message_has_both_files_and_both_values(other: Scan, said: str) -> None:
    with pytest.raises(GridError, match=said) as caught:
        require_same_grid(scan(), other)
    assert "a.nii.gz and b.nii.gz" in str(caught.value)
    assert grid_difference(scan(), other)
