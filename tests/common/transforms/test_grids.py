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

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.io.scans import affine_3d
from common.transforms.grids import affine_of, onto_grid, spaced_grid

OBLIQUE = np.array([[0.9, -0.4, 0.1, 20], [0.5, 1.1, -0.2, -7], [0.0, 0.3, 2.1, 4], [0, 0, 0, 1]])
PLANE = np.array([[1.2, -0.3, 5], [0.4, 0.8, -3], [0, 0, 1]])
SLOPE = np.array([0.03, -0.02, 0.05])


def ramp(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A linear function of the world on a grid; linear interpolation changes nothing about it."""
    index = np.indices(shape).reshape(len(shape), -1)
    points = affine[:-1, :-1] @ index + affine[:-1, -1:]
    return (SLOPE[: len(shape)] @ points).reshape(shape)


def image(shape: tuple[int, ...], affine: np.ndarray) -> MetaTensor:
    values = torch.from_numpy(ramp(shape, affine)).float()[None]
    return MetaTensor(values, affine=torch.from_numpy(affine_3d(affine)))


def test_a_coarser_and_a_finer_grid_have_the_same_middle_and_extent() -> None:
    shape, affine = spaced_grid((10, 21), np.diag([1.0, 2.0, 1.0]), (2.5, 1.0))
    # 10 mm are 4 voxels of 2.5 mm from -0.5 on: the first has its centre at 0.75. 42 mm are 42 voxels from -1 on.
    assert shape == (4, 42)
    np.testing.assert_allclose(affine, [[2.5, 0, 0.75], [0, 1, -0.5], [0, 0, 1]])


def test_a_spacing_that_is_the_grids_own_leaves_it() -> None:
    for spacing in (None, (1.003, 2.0)):
        shape, affine = spaced_grid((10, 21), np.diag([1.0, 2.0, 1.0]), spacing)
        assert shape == (10, 21) and np.array_equal(affine, np.diag([1.0, 2.0, 1.0]))


def test_no_axis_is_lost() -> None:
    assert spaced_grid((3, 40), np.eye(3), (10.0, 10.0))[0] == (1, 4)


@pytest.mark.parametrize(("shape", "affine"), [((11, 12, 9), OBLIQUE), ((11, 12), PLANE)])
def test_what_is_seen_is_at_its_place_in_the_world(shape: tuple[int, ...], affine: np.ndarray) -> None:
    scan = image(shape, affine)
    grid = spaced_grid(shape, affine, [1.1] * len(shape))
    matrix = np.eye(len(shape) + 1)
    matrix[:-1] += np.random.default_rng(0).uniform(-0.05, 0.05, matrix[:-1].shape)
    seen = onto_grid(scan, *grid, matrix, label=False, padding="border")
    np.testing.assert_allclose(affine_of(seen), matrix @ grid[1])
    expected = ramp(grid[0], affine_of(seen))
    # Beyond the outermost centres the border repeats.
    inner = (slice(None), *[slice(2, -2)] * len(shape))
    np.testing.assert_allclose(seen.numpy()[inner], expected[None][inner], atol=1e-5)


def test_beyond_an_image_lies_nothing_or_its_lowest_value() -> None:
    scan = MetaTensor(torch.tensor([[[3.0, 4.0], [5.0, 6.0]]]), affine=torch.eye(4, dtype=torch.float64))
    grid = (2, 2), np.array([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]])  # one row further
    options = {"label": False, "padding": "zeros"}
    assert onto_grid(scan, *grid, np.eye(3), **options).tolist() == [[[5, 6], [0, 0]]]
    assert onto_grid(scan - 10, *grid, np.eye(3), **options).tolist() == [[[-5, -4], [-7, -7]]]
    assert onto_grid(scan, *grid, np.eye(3), label=False, padding="border").tolist() == [[[5, 6], [5, 6]]]


def test_of_label_maps_the_nearest_voxel_is_taken() -> None:
    scan = MetaTensor(torch.tensor([[[3, 900000001], [5, 6]]], dtype=torch.int32), affine=torch.eye(4).double())
    grid = (2, 3), np.array([[1.0, 0, 0], [0, 0.5, 0.1], [0, 0, 1]])
    seen = onto_grid(scan, *grid, np.eye(3), label=True, padding="border")
    assert seen.dtype == torch.int32 and seen.tolist() == [[[3, 900000001, 900000001], [5, 6, 6]]]
