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
"""From coarse to fine: the images of each level, and q(v) carried from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.networks import average_pool, pad_to_multiple

from .posterior import LowRankGaussian
from .transformation import BSplineVelocity, Transformation
from .variational import VariationalProblem

__all__ = ["Level", "axis_factors", "carried", "check_levels", "coarser", "lattice_values", "schedule"]

_FEWEST = 4  # voxels that an axis keeps at least
_CORRECTIONS = 4


class Level(NamedTuple):
    """Images of one resolution.

    Attributes:
        factors: voxels of the full resolution in one of these, along each axis.
        moving: (B, 1, *s).
        fixed: (1 or B, 1, *s).
        mask: (1 or B, 1, *s) bool, or None.
    """

    factors: tuple[int, ...]
    moving: Tensor
    fixed: Tensor
    mask: Tensor | None


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The reduction factors of the levels, checked.

    Raises:
        ValueError: unless they are whole numbers that fall to 1.
    """
    found = tuple(int(level) for level in levels)
    if not found or found[-1] != 1 or list(found) != sorted(set(found), reverse=True):
        raise ValueError(f"levels must be whole numbers that fall to 1, such as (4, 2, 1), got {tuple(levels)}")
    return found


def schedule(total: int, parts: Sequence[int]) -> list[int]:
    """Whole numbers that add up to ``total``, in proportion to ``parts``."""
    ends = [round(total * sum(parts[: k + 1]) / sum(parts)) for k in range(len(parts))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def axis_factors(size: Sequence[int], level: int) -> tuple[int, ...]:
    """The reduction of each axis at a level: less than the level's where an axis would be left with almost nothing."""
    return tuple(max(1, min(level, n // _FEWEST)) for n in size)


def coarser(moving: Tensor, fixed: Tensor, mask: Tensor | None, level: int) -> Level:
    """Means of blocks of voxels; a block belongs to the mask if one of its voxels does.

    Axes that are no multiple of the factor end with a block that repeats their last voxel.

    Args:
        moving: (B, 1, *S).
        fixed: (1 or B, 1, *S).
        mask: (1 or B, 1, *S) bool, or None.
        level: the reduction factor.
    """
    factors = axis_factors(moving.shape[2:], level)
    if max(factors) == 1:
        return Level(factors, moving, fixed, mask)
    pooled = [average_pool(pad_to_multiple(image.float(), factors), factors) for image in (moving, fixed)]
    if mask is not None:
        mask = average_pool(pad_to_multiple(mask.float(), factors), factors) > 0
    return Level(factors, pooled[0], pooled[1], mask)


@torch.no_grad()
def carried(
    problem: VariationalProblem, posterior: LowRankGaussian, factors: Sequence[float], size: Sequence[int]
) -> LowRankGaussian:
    """A distribution that was fitted at one level as the start of the next.

    The smoothed mean is what is carried: its kernel is as wide in voxels at every level, so that on a finer grid it
    changes this mean little. The diagonal's standard deviations stay what they are in voxels. They are of white noise,
    which has no counterpart on another grid, and follow from the regularisation, which is the same at all levels.

    Args:
        problem: what it was fitted to.
        posterior: on the lattice of the coarser level.
        factors: voxels of the next level in one of that level, along each axis.
        size: of the images of the next.
    """
    transformation = problem.transformation
    smooth = LowRankGaussian(problem.smoothing(posterior.mean), posterior.log_var.detach(), posterior.factors.detach())
    result = transformation.carry(smooth, size, factors)
    scale = result.log_var.new_tensor([float(factor) for factor in factors]).log()
    result.log_var -= 2 * scale.view(-1, *(1,) * len(factors))
    return result


def lattice_values(transformation: Transformation, velocity: Tensor, factors: Sequence[int]) -> Tensor:
    """Parameters of a level whose velocity is nearly a given one.

    Args:
        transformation: says where the parameters lie.
        velocity: (B, d, *S), voxels of the full resolution.
        factors: voxels of the full resolution in one of the level, along each axis.

    Returns:
        (B, d, *lattice), voxels of the level.
    """
    velocity = velocity.detach().float()
    if max(factors) > 1:
        scale = velocity.new_tensor([float(f) for f in factors]).view(-1, *(1,) * len(factors))
        velocity = average_pool(pad_to_multiple(velocity, factors), factors) / scale
    if not isinstance(transformation, BSplineVelocity):
        return velocity
    size = velocity.shape[2:]
    values = _at_control_points(transformation, velocity)
    for _ in range(_CORRECTIONS):
        # Splines average neighbouring points: what that takes off a smooth field is put back.
        values = values + _at_control_points(transformation, velocity - transformation.dense(values, size))
    return values


def _at_control_points(transformation: BSplineVelocity, velocity: Tensor) -> Tensor:
    """A field at the control points; point j lies at voxel ``spacing * (j - 1)``, or beyond the border."""
    size, spacing = velocity.shape[2:], transformation.spacing
    spacings = spacing * len(size) if len(spacing) == 1 else spacing
    for axis, (n, step, count) in enumerate(zip(size, spacings, transformation.lattice(size), strict=True), 2):
        places = (step * (torch.arange(count, device=velocity.device) - 1)).clamp(0, n - 1)
        velocity = velocity.index_select(axis, places)
    return velocity
