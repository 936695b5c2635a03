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

from dataclasses import replace

import numpy as np
import pytest
import torch

from common.handlers.report import ReportInputs
from common.handlers.report.volumes import turned_volumes
from tests.common.handlers.report.example import SHAPE, pair, scaling, scan

# Axes of the file run left, posterior and superior; then inferior, right and anterior.
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
IRA = np.array([[0, 2.0, 0, 5], [0, 0, 3.0, 6], [-1.0, 0, 0, 7], [0, 0, 0, 1]])


def spot(voxel: tuple[int, ...]) -> np.ndarray:
    image = np.zeros(SHAPE[: len(voxel)], dtype="float32")
    image[voxel] = 1.0
    return image


@pytest.mark.parametrize(
    ("affine", "turned", "millimetres"),
    [(np.eye(4), (2, 3, 4), (1, 1, 1)), (LPS, (10, 7, 4), (1, 1, 1)), (IRA, (3, 4, 10), (2, 3, 1))],
)
def test_volumes_are_turned_to_right_anterior_superior(
    affine: np.ndarray, turned: tuple[int, ...], millimetres: tuple[float, ...]
) -> None:
    image = spot((2, 3, 4))
    inputs = pair(
        affine=affine, before=image, fixed_label=image.astype(int), maps={"a map": image}, fixed_points=[[2, 3, 4]]
    )
    volumes = turned_volumes(inputs)
    for volume in (volumes.images["before"], volumes.labels["fixed"], volumes.maps["a map"]):
        assert np.argwhere(volume > 0.5).tolist() == [list(turned)]
    assert volumes.points["fixed"].tolist() == [list(turned)]
    assert tuple(volumes.millimetres) == millimetres and volumes.codes() == ("R", "A", "S")
    # The voxel is where it was, and is found in the file again.
    np.testing.assert_allclose(volumes.affine @ [*turned, 1], affine @ [2, 3, 4, 1])
    assert {volumes.file_index(axis, turned[axis]) for axis in range(3)} == {(0, 2), (1, 3), (2, 4)}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("affine", [np.eye(4), LPS])
@pytest.mark.parametrize("by", [0.8, 1.25])
def test_the_determinant_of_a_scaling_is_its_power(dims: int, affine: np.ndarray, by: float) -> None:
    volumes = turned_volumes(pair(dims, affine, ddf=scaling(dims, by)))
    np.testing.assert_allclose(volumes.determinant, by**dims, rtol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_grids_of_two_files_do_not_count_as_deformation(dims: int) -> None:
    other = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -4], [0, 0, -1.0, 9], [0, 0, 0, 1]])
    inputs = pair(dims)
    moving = scan(np.zeros((9, 8, 6)[:dims]), other)
    keep = [*range(dims), 3]
    grid = np.stack([*np.meshgrid(*map(np.arange, SHAPE[:dims]), indexing="ij"), np.ones(SHAPE[:dims])])
    there = np.tensordot(np.linalg.inv(other[np.ix_(keep, keep)]), grid, axes=1)
    volumes = turned_volumes(replace(inputs, moving=moving, ddf=(there - grid)[:dims]))
    np.testing.assert_allclose(volumes.source, grid[:dims], atol=1e-5)
    np.testing.assert_allclose(volumes.determinant, 1, rtol=1e-4)


def test_a_displacement_turns_with_its_axes() -> None:
    ddf = np.zeros((3, *SHAPE))
    # Along the first axis of the file, which runs inferior.
    ddf[0] = 2.0
    volumes = turned_volumes(pair(affine=IRA, ddf=ddf))
    grid = np.stack(np.meshgrid(*map(np.arange, volumes.shape), indexing="ij"))
    moved = (volumes.source - grid).reshape(3, -1)
    assert (moved == np.array([[0], [0], [-2]])).all()


def test_moving_and_moved_share_a_grey_scale_and_fixed_has_its_own() -> None:
    ramp = np.linspace(0, 1, int(np.prod(SHAPE))).reshape(SHAPE)
    volumes = turned_volumes(replace(pair(before=ramp, moved=ramp / 2), fixed=scan(100 * ramp)))
    assert [int(volumes.images[name].max()) for name in ("fixed", "before", "moved")] == [255, 255, 128]


def test_a_few_bright_voxels_are_seen() -> None:
    volumes = turned_volumes(pair(before=10 * spot((2, 3, 4)), moved=5 * spot((2, 3, 4))))
    assert (volumes.images["before"].max(), volumes.images["moved"].max()) == (255, 128)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("value", [0.0, 7.0, np.nan])
@pytest.mark.filterwarnings("error")
def test_images_without_contrast_are_black_and_shown_in_full(dims: int, value: float) -> None:
    flat = np.full(SHAPE[:dims], value, dtype="float32")
    volumes = turned_volumes(replace(pair(dims, before=flat, moved=flat), fixed=scan(flat)))
    assert not any(image.any() for image in volumes.images.values())
    assert volumes.box.tolist() == [[0, n - 1] for n in SHAPE[:dims]]


def test_the_box_is_that_of_what_is_not_dark_in_any_image() -> None:
    dark = np.zeros((40, 30), dtype="float32")
    fixed, before = dark.copy(), dark.copy()
    fixed[10:20, 8] = 1.0
    before[25, 12:29] = 1.0
    volumes = turned_volumes(ReportInputs(scan(dark), scan(fixed), before, before, np.zeros((2, 40, 30))))
    assert volumes.box.tolist() == [[8, 27], [6, 29]]


def test_tensors_of_any_kind_are_taken() -> None:
    image = torch.rand(1, 1, *SHAPE, dtype=torch.bfloat16, requires_grad=True)
    label = torch.ones(1, *SHAPE, dtype=torch.int32)
    ddf = torch.zeros(1, 3, *SHAPE, dtype=torch.float64, requires_grad=True)
    volumes = turned_volumes(pair(before=image, moved=image, fixed_label=label, ddf=ddf))
    assert volumes.images["before"].shape == SHAPE and volumes.labels["fixed"].all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ddf": np.zeros((1, 2, *SHAPE))}, r"ddf must be \(1, 3, \*\(13, 11, 7\)\)"),
        ({"before": np.zeros((11, 13, 7))}, r"before must be \(13, 11, 7\), .*got \(11, 13, 7\)"),
        ({"moved": np.zeros((2, *SHAPE))}, "moved must be"),
        ({"fixed_label": np.zeros((13, 11))}, "fixed_label must be"),
        ({"maps": {"certainty": np.zeros((1, 2, 3))}}, "certainty must be"),
        ({"moved_points": np.zeros((5, 2))}, r"moved_points must be \(N, 3\), got \(5, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair(**wrong)
