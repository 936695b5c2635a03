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
"""Two scans of different size, orientation and spacing find one grid."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.io import common_grid, load_image
from common.transforms.preprocessing import scan_transforms


def write(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(shape, dtype=np.float32), affine), path)
    return path


def test_sizes_are_compared_in_one_orientation(tmp_path: Path) -> None:
    turned = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # PSR: axes 2, 0, 1 are R, A, S
    moving = write(tmp_path / "m.nii.gz", (10, 20, 30), turned)
    fixed = write(tmp_path / "f.nii.gz", (25, 12, 18), np.eye(4))
    grid = common_grid(load_image(moving), load_image(fixed))
    assert grid == {"spatial_size": [30, 12, 20], "spacing": None}
    loaded = scan_transforms(["image"], **grid)({"image": str(moving)})["image"]
    assert tuple(loaded.shape) == (1, 30, 12, 20)


def test_different_spacings_meet_at_the_fixed_one_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moving = write(tmp_path / "m.nii.gz", (10, 10, 10), np.diag([2.0, 2.0, 3.0, 1.0]))
    fixed = write(tmp_path / "f.nii.gz", (16, 24, 16), np.eye(4))
    with caplog.at_level(logging.WARNING):
        grid = common_grid(load_image(moving), load_image(fixed))
    assert grid == {"spatial_size": [20, 24, 30], "spacing": [1.0, 1.0, 1.0]}
    assert "m.nii.gz has spacing [2. 2. 3.] mm" in caplog.text


@pytest.mark.parametrize("affine", [np.diag([0.5, 0.5, 5.0, 1.0]), np.eye(4)[[2, 0, 1, 3]]])
def test_a_volume_of_one_slice_is_two_dimensional(tmp_path: Path, affine: np.ndarray) -> None:
    moving, fixed = (write(tmp_path / f"{n}.nii.gz", (9, 11, 1), affine) for n in "mf")
    grid = common_grid(load_image(moving), load_image(fixed))
    assert grid["spatial_size"] == [9, 11]
    loaded = scan_transforms(["image"], orientation=None, **grid)({"image": str(moving)})["image"]
    assert tuple(loaded.shape) == (1, 9, 11)
    assert abs(np.linalg.det(np.asarray(loaded.affine)[:2, :2])) > 0.1


def test_a_spacing_of_its_own(tmp_path: Path) -> None:
    moving = write(tmp_path / "m.nii.gz", (10, 10, 10), np.diag([2.0, 2.0, 3.0, 1.0]))
    fixed = write(tmp_path / "f.nii.gz", (16, 24, 16), np.eye(4))
    grid = common_grid(load_image(moving), load_image(fixed), spacing=[2, 3.0, 1.5])
    assert grid == {"spatial_size": [10, 8, 20], "spacing": [2.0, 3.0, 1.5]}
