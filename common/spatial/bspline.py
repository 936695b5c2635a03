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
"""Cubic B-splines: displacements from control points on a coarse grid, and how large these may be without a fold.

Control point t along an axis lies at voxel ``factor * t + (factor - 1) / 2``: in the middle of the block of voxels that
it stands for. Control points outside of the grid repeat those at its border.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.spatial.exporting import exporting
from common.spatial.grid import as_field

__all__ = ["bspline_displacement", "contraction_bound", "cubic_bspline"]


def cubic_bspline(distance: Tensor) -> Tensor:
    """The cubic B-spline: ``2/3 - s^2 + |s|^3/2`` for ``|s| < 1``, ``(2 - |s|)^3/6`` for ``|s| < 2``, else 0."""
    s = distance.abs()
    return torch.where(s < 1, 2 / 3 - s**2 + s**3 / 2, (2 - s).clamp_min(0) ** 3 / 6)


def bspline_displacement(
    control_points: Tensor, factor: float | Sequence[float], size: Sequence[int] | None = None
) -> Tensor:
    """The field ``ddf_k(x) = factor_k * sum_t c_k(t) * prod_j beta(q_j - t_j)`` with ``q = (x + 0.5)/factor - 0.5``.

    Source: Rueckert et al., Nonrigid registration using free-form deformations (IEEE TMI 1999); no prefilter.

    Args:
        control_points: (B, d, *s), in spacings of their own grid.
        factor: voxels between control points, one number or one an axis; at least 1, not necessarily whole.
        size: of the field; ``s * factor``, rounded down, if not given. Beyond the control points the outermost ones
            are repeated.

    Returns:
        (B, d, *size), in voxels, float32 (float64 if the control points are).

    Raises:
        ValueError: when ``control_points`` is no field, or a factor or a size is below 1 or there are too few of them.
    """
    points = as_field(control_points, "control_points")
    grid = points.shape[2:]
    factors = (factor,) * len(grid) if isinstance(factor, (int, float)) else tuple(factor)
    own = (torch.sym_int(n * f) for n, f in zip(grid, factors, strict=False))
    wanted = tuple(own) if size is None else tuple(size)
    if not len(factors) == len(wanted) == len(grid) or min((*factors, *wanted)) < 1:
        raise ValueError(f"factor {factor} and size {size} must be positive, one an axis, for {tuple(points.shape)}")
    with torch.autocast(points.device.type, enabled=False):
        if len(set(factors)) == 1:
            points = points * factors[0]
        else:
            points = torch.stack([points[:, axis] * f for axis, f in enumerate(factors)], dim=1)
        for axis in reversed(range(len(grid))):  # the last first: then the large products run over contiguous rows
            points = _along(points, axis, factors[axis], wanted[axis])
    return points


@lru_cache(maxsize=64)
def contraction_bound(factor: int, spatial_dims: int = 3) -> float:
    """The least upper bound on control points, in their spacings, below which no displacement can fold.

    If every ``|c| < bound``, then ``ddf`` of :func:`bspline_displacement`, interpolated linearly between voxels, brings
    no two points closer or further apart by more than their distance (in the maximum norm). So ``x + ddf(x)`` is
    invertible, and ``v = -ddf(x + v)`` converges to the inverse.

    Within a cell of the voxel grid each partial derivative is linear in every other coordinate. So the worst place is a
    corner of a cell, where derivatives are one-sided differences, and the worst control points are as large as may be,
    each with the sign of its weight. By the mirror symmetry of the spline all differences may be taken forwards.
    Source: Honkamaa and Marttinen, SITReg (2023), who tabulate the bounds.

    Args:
        factor: voxels between control points.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: when ``factor`` is below 1.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    # One voxel a phase, around control point 0; four (with the difference five) control points reach it.
    position = (torch.arange(factor, dtype=torch.float64) + 0.5) / factor - 0.5
    control = torch.arange(-2, 4, dtype=torch.float64)
    weight = cubic_bspline(position[:, None] - control)
    slope = factor * (cubic_bspline(position[:, None] + 1 / factor - control) - weight)
    worst = 0.0
    for phase in range(factor):  # of the first axis; all phases of the others at once
        total = _outer([slope[phase : phase + 1]] + [weight] * (spatial_dims - 1))
        for axis in range(1, spatial_dims):
            first = [weight[phase : phase + 1]] + [weight] * (spatial_dims - 1)
            first[axis] = slope
            total = total + _outer(first)
        worst = max(worst, float(total.abs().sum(tuple(range(spatial_dims, 2 * spatial_dims))).max()))
    return 1.0 / worst


def _outer(factors: list[Tensor]) -> Tensor:
    """The product of matrices (phases, points): (phases, phases, ..., points, points, ...)."""
    dims = len(factors)
    product = torch.ones((), dtype=torch.float64)
    for axis, matrix in enumerate(factors):
        shape = [1] * (2 * dims)
        shape[axis], shape[dims + axis] = matrix.shape
        product = product * matrix.view(shape)
    return product


def _along(points: Tensor, axis: int, factor: float, size: int) -> Tensor:
    """Evaluate the spline along one spatial axis."""
    if factor == 1 and size == points.shape[2 + axis]:
        smoothed: Tensor = _smooth_plainly(points, 2 + axis) if exporting() else _Smooth.apply(points, 2 + axis)
        return smoothed
    # While sizes are left open there is nothing to keep.
    matrix = (_matrix if exporting() else _kept_matrix)(points.shape[2 + axis], factor, size).to(points)
    if axis == points.dim() - 3:
        return points @ matrix.T
    before, after = points.shape[: 2 + axis], points.shape[3 + axis :]
    return (matrix @ points.reshape(*before, points.shape[2 + axis], -1)).reshape(*before, size, *after)


def _matrix(count: int, factor: float, size: int) -> Tensor:
    """(size, count): the weight of every control point in every voxel, those outside added to the outermost."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / factor - 0.5
    number = torch.arange(count, dtype=torch.float64)
    matrix = torch.zeros((), dtype=torch.float64)
    for offset in range(-1, 3):
        control = position.floor() + offset
        column = control.clamp(0, count - 1)[:, None] == number
        matrix = matrix + column * cubic_bspline(position - control)[:, None]
    return matrix


_kept_matrix = lru_cache(maxsize=64)(_matrix)


class _Smooth(torch.autograd.Function):
    """Factor 1: weights 1/6, 2/3, 1/6 along a dimension. With a repeated border the operator is its own transpose."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        return _smooth(points, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _smooth(gradient, ctx.dim), None


def _smooth(points: Tensor, dim: int) -> Tensor:
    count = points.shape[dim]
    result = points * (2 / 3)
    result.narrow(dim, 0, 1).add_(points.narrow(dim, 0, 1), alpha=1 / 6)
    result.narrow(dim, count - 1, 1).add_(points.narrow(dim, count - 1, 1), alpha=1 / 6)
    if count > 1:
        result.narrow(dim, 1, count - 1).add_(points.narrow(dim, 0, count - 1), alpha=1 / 6)
        result.narrow(dim, 0, count - 1).add_(points.narrow(dim, 1, count - 1), alpha=1 / 6)
    return result


def _smooth_plainly(points: Tensor, dim: int) -> Tensor:
    """:func:`_smooth` without writing into parts of a tensor, for networks that are exported."""
    count = points.shape[dim]
    wide = torch.cat([points.narrow(dim, 0, 1), points, points.narrow(dim, count - 1, 1)], dim)
    return points * (2 / 3) + (wide.narrow(dim, 0, count) + wide.narrow(dim, 2, count)) * (1 / 6)
