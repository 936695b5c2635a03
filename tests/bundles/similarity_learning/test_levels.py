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
"""Levels of resolution: their images, and what is carried between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bundles.similarity_learning.scripts.levels import (
    axis_factors,
    carried,
    check_levels,
    coarser,
    lattice_values,
    schedule,
)
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import VariationalProblem
from common.spatial import identity_grid


def problem_of(transformation: str, dims: int) -> VariationalProblem:
    return VariationalProblem(
        Similarity("ssd", spatial_dims=dims),
        build_transformation(transformation),
        SobolevSmoothing(),
        DifferenceEnergy(),
    )


@pytest.mark.parametrize("levels", [(), (4, 2), (1, 2), (2, 2, 1), (0, 1)])
def test_levels_fall_to_one(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="fall to 1"):
        check_levels(levels)
    assert check_levels([4, 2, 1]) == (4, 2, 1)


def test_schedule_adds_up() -> None:
    assert schedule(10, (1, 1, 1)) == [3, 4, 3]
    assert schedule(1024, (2, 1, 1)) == [512, 256, 256]
    assert schedule(1, (1, 1, 1)) == [0, 1, 0]
    assert schedule(7, (0, 3)) == [0, 7]


def test_short_axes_are_reduced_less() -> None:
    assert axis_factors((64, 9, 3), 4) == (4, 2, 1)


def test_blocks_are_averaged() -> None:
    moving = torch.arange(10.0).view(1, 1, 10, 1).expand(1, 1, 10, 8)
    mask = torch.zeros(1, 1, 10, 8, dtype=torch.bool)
    mask[..., 9, 7] = True
    level = coarser(moving, moving + 1, mask, 2)
    assert level.factors == (2, 2)
    torch.testing.assert_close(level.moving[0, 0, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5, 8.5]))
    torch.testing.assert_close(level.fixed, level.moving + 1)
    assert level.mask is not None
    assert level.mask.sum() == 1 and level.mask[0, 0, 4, 3]
    odd = coarser(moving[:, :, :9], moving[:, :, :9], None, 2)
    torch.testing.assert_close(odd.moving[0, 0, :, 0], torch.tensor([0.5, 2.5, 4.5, 6.5, 8.0]))
    assert coarser(moving, moving, mask, 1).moving is moving


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("size", [(40, 32), (17, 22), (20, 16, 18)])
def test_carried_field_is_the_same_motion(transformation: str, size: tuple[int, ...]) -> None:
    """In voxels of the finer grid, at the places the coarser voxels have there."""
    problem, dims = problem_of(transformation, len(size)), len(size)
    coarse = tuple(-(-n // 2) for n in size)
    lattice = problem.transformation.lattice(coarse)
    places = [axis / max(1, n - 1) for axis, n in zip(identity_grid(lattice), lattice, strict=True)]
    mean = torch.stack([torch.sin(2 * places[k - 1] + k) for k in range(dims)])[None]
    posterior = LowRankGaussian.initial(1, lattice, dims, rank=2, sigma=0.7, mean=mean)
    fine = carried(problem, posterior, (2.0,) * dims, size)
    assert tuple(fine.mean.shape[2:]) == problem.transformation.lattice(size)
    before, after = problem.displacement(posterior.mean, coarse), problem.displacement(fine.mean, size)
    even = [(n // 2) * 2 for n in size]
    seen = (
        F.avg_pool2d(after[..., : even[0], : even[1]], 2)
        if dims == 2
        else F.avg_pool3d(after[..., : even[0], : even[1], : even[2]], 2)
    )
    for axis, n in enumerate(even, 2):
        before = before.narrow(axis, 0, n // 2)
    assert float((seen - 2 * before).abs().mean()) < 0.02 * float(2 * before.abs().mean())
    torch.testing.assert_close(fine.log_var.detach(), torch.full_like(fine.log_var, 2 * torch.tensor(0.7).log().item()))
    torch.testing.assert_close(fine.factors[:, 0].detach(), torch.full_like(fine.factors[:, 0], 0.2))


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize(("size", "factors"), [((24, 19), (1, 1)), ((24, 19), (2, 2)), ((16, 12, 14), (2, 1, 2))])
def test_parameters_of_a_velocity(transformation: str, size: tuple[int, ...], factors: tuple[int, ...]) -> None:
    problem = problem_of(transformation, len(size))
    grid = [axis / n for axis, n in zip(identity_grid(size), size, strict=True)]
    velocity = torch.stack([3 * torch.cos(2 * grid[k - 1]) for k in range(len(size))])[None]
    values = lattice_values(problem.transformation, velocity, factors)
    coarse = tuple(-(-n // f) for n, f in zip(size, factors, strict=True))
    dense = problem.transformation.dense(values, coarse)
    pool = F.avg_pool2d if len(size) == 2 else F.avg_pool3d
    for k, factor in enumerate(factors):
        expected = pool(velocity[:, k, None], factors)[0, 0] / factor
        seen = dense[0, k][tuple(slice(0, n) for n in expected.shape)]
        assert float((seen - expected).abs().mean()) < 0.03 * float(expected.abs().mean())
        assert float((seen - expected).abs().max()) < 0.3 / factor
