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

from common.io import Scan, common_grid, load_image, pair_grid, save_image


def write(path: Path, shape: tuple[int, ...], spacing: tuple[float, ...] = (1.5, 1.5, 8.0)) -> Scan:
    rng = np.random.default_rng(0)
    return load_image(save_image(path, rng.random(shape).astype(np.float32), np.diag([*spacing[: len(shape)], 1.0])))


def test_stacks_meet_in_the_plane_that_holds_both(tmp_path: Path) -> None:
    moving, fixed = write(tmp_path / "a.nii.gz", (20, 30, 7)), write(tmp_path / "b.nii.gz", (24, 28, 7))
    assert pair_grid(moving, fixed, stacks=True) == {"spatial_size": [24, 30], "spacing": None}
    assert pair_grid(moving, fixed) == common_grid(moving, fixed)


def test_stacks_that_were_cut_differently_are_refused(tmp_path: Path) -> None:
    moving = write(tmp_path / "a.nii.gz", (20, 30, 7))
    with pytest.raises(ValueError, match=r"a.nii.gz has 7 slices and .*b.nii.gz has 8"):
        pair_grid(moving, write(tmp_path / "b.nii.gz", (20, 30, 8)), stacks=True)
    with pytest.raises(ValueError, match=r"voxels of \[1.5 1.5 8. \] mm and .*c.nii.gz of \[1.5 1.5 6. \]"):
        pair_grid(moving, write(tmp_path / "c.nii.gz", (20, 30, 7), (1.5, 1.5, 6.0)), stacks=True)
    with pytest.raises(ValueError, match=r"d.nii.gz is 2-D; a stack of slices is 3-D"):
        pair_grid(moving, write(tmp_path / "d.nii.gz", (20, 30)), stacks=True)
