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
"""Diffeomorphisms from few numbers: the flow of a velocity that is a cubic B-spline, at any resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial import bspline_displacement, integrate

__all__ = ["SplineFlow"]

_STEP = 2  # voxels between the places that the flow is followed from


class SplineFlow:
    """``exp(v)`` of a velocity ``v`` with control points on a grid that all resolutions share.

    A velocity with control points ``spacing`` voxels apart is smooth, so it need not be followed from every voxel. It
    is integrated on a grid of every second voxel along each axis, an eighth of a volume (control points in every voxel
    are taken as they are). The displacement at the voxels is that of a cubic spline that comes near to those of the
    grid, far nearer to the flow than a linear one.

    Places are counted in blocks: voxel i of a resolution that joins f voxels along an axis lies at ``f i + (f - 1)/2``.

    Args:
        size: of the image at full resolution, in voxels.
        spacing: voxels between control points.
        squarings: of the exponential, by scaling and squaring.
    """

    def __init__(self, size: Sequence[int], spacing: int, squarings: int) -> None:
        self.size, self.spacing, self.squarings = tuple(size), spacing, squarings
        self.step = min(spacing, _STEP)

    def control_points(self, like: Tensor) -> Tensor:
        """Control points (B, d, *s) of no change, in spacings.

        Args:
            like: (B, d, ...), for the batch size, the device and the dtype.
        """
        return like.new_zeros(*like.shape[:2], *_parts(self.size, [self.spacing] * len(self.size)))

    def displacement(self, points: Tensor, voxels: Sequence[int] | None = None) -> Tensor:
        """``exp(v)(x) - x``; that of ``-points`` is nearly the inverse.

        Args:
            points: (B, d, *s), in spacings.
            voxels: how many voxels one of the resulting field joins along each axis: 1, the default, or the step of
                the flow's grid.

        Returns:
            (B, d, *S), in its own voxels.
        """
        steps = [self.step] * len(self.size)
        voxels = [1] * len(self.size) if voxels is None else voxels
        velocity = bspline_displacement(points, self.spacing / self.step, _parts(self.size, steps))
        flow = integrate(velocity, self.squarings)
        if list(voxels) == steps:
            return flow
        factors = [step // voxel for step, voxel in zip(steps, voxels, strict=True)]
        return bspline_displacement(_coefficients(flow), factors, _parts(self.size, voxels))


def _parts(size: Sequence[int], voxels: Sequence[int]) -> list[int]:
    """How many blocks of so many voxels an image has, the last ones incomplete."""
    return [-(-n // f) for n, f in zip(size, voxels, strict=True)]


def _coefficients(values: Tensor) -> Tensor:
    """Control points (B, d, *s) of the spline that comes near to these values at them, by the weights -1/6, 4/3, -1/6.

    It is as good as the spline through the values, exact for cubic polynomials, but local: where the values are 0, so
    is it six places further on. Source: Lyche and Schumaker, Local spline approximation methods (J. Approx. Theory
    1975).
    """
    for axis in range(2, values.dim()):
        count = values.shape[axis]
        first, last = values.narrow(axis, 0, 1), values.narrow(axis, count - 1, 1)
        wide = torch.cat([first, values, last], axis)
        values = values * (4 / 3) - (wide.narrow(axis, 0, count) + wide.narrow(axis, 2, count)) * (1 / 6)
    return values
