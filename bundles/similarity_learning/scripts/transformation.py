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
"""Transformations of images as functions of the parameters that q(v) is a distribution over.

Both integrate a stationary velocity field by scaling and squaring. Its parameters are the velocity itself, in every
voxel, or control points of cubic B-splines on a lattice that is coarser by ``spacing`` and has one point more at
either end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from common.losses.checks import check_choice, full_precision
from common.spatial import resample_field
from common.spatial.bspline import cubic_bspline
from common.spatial.grid import as_field

from .integration import integrate_quickly
from .posterior import LowRankGaussian

__all__ = ["BSplineVelocity", "StationaryVelocity", "Transformation", "build_transformation"]


class Transformation(nn.Module, ABC):
    """A displacement field from parameters on a lattice.

    Args:
        steps: squarings; the published number is 12. More than 7 cost no more than 7: see :func:`integrate_quickly`.
        integration_factor: integrate on a grid that is so many times coarser, which is faster, and smooths the field.

    Raises:
        ValueError: when ``steps`` is negative or the factor below 1.
    """

    def __init__(self, steps: int = 12, integration_factor: int = 1) -> None:
        super().__init__()
        if steps < 0 or integration_factor < 1:
            raise ValueError(f"steps must be 0 or more, integration_factor 1 or more: {steps}, {integration_factor}")
        self.steps, self.integration_factor = steps, integration_factor

    @abstractmethod
    def lattice(self, size: Sequence[int]) -> tuple[int, ...]:
        """The lattice of parameters of an image of ``size`` voxels."""

    @abstractmethod
    def dense(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        """The velocity in every voxel.

        Args:
            lattice_values: (B, d, *lattice(size)), voxels a unit of time.
            size: of the image.

        Returns:
            (B, d, *size), voxels a unit of time, float32 (float64 if the values are).

        Raises:
            ValueError: when the values are on another lattice.
        """

    @abstractmethod
    def carry(
        self, posterior: LowRankGaussian, size: Sequence[int], factor_per_axis: Sequence[float]
    ) -> LowRankGaussian:
        """A distribution of parameters put on a finer image's lattice.

        Args:
            posterior: of the parameters of a coarser image.
            size: of the finer image.
            factor_per_axis: voxels of the finer image in one of the coarser, along each axis.
        """

    def forward(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        """The displacement field (B, d, *size), in voxels; arguments as for :meth:`dense`."""
        return self.integrate(self.dense(lattice_values, size))

    def integrate(self, velocity: Tensor) -> Tensor:
        """The displacement (B, d, *S) in voxels after unit time along a velocity (B, d, *S)."""
        size = velocity.shape[2:]
        if self.integration_factor == 1:
            return integrate_quickly(velocity, self.steps)
        coarse = [-(-n // self.integration_factor) for n in size]
        velocity = resample_field(velocity, coarse, align_corners=False)
        return resample_field(integrate_quickly(velocity, self.steps), size, align_corners=False)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"steps={self.steps}, integration_factor={self.integration_factor}"

    def _checked(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        values, lattice = as_field(lattice_values, "lattice_values"), self.lattice(size)
        if tuple(values.shape[2:]) != lattice:
            raise ValueError(
                f"an image of {tuple(size)} voxels has parameters on {lattice} points, got {tuple(values.shape)}"
            )
        return values


class StationaryVelocity(Transformation):
    """A velocity in every voxel."""

    def lattice(self, size: Sequence[int]) -> tuple[int, ...]:
        """The image's own grid."""
        return tuple(int(n) for n in size)

    def dense(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        """The parameters themselves; see :meth:`Transformation.dense`."""
        return self._checked(lattice_values, size)

    def carry(
        self, posterior: LowRankGaussian, size: Sequence[int], factor_per_axis: Sequence[float]
    ) -> LowRankGaussian:
        """See :meth:`Transformation.carry`."""
        return posterior.resized(self.lattice(size), factor_per_axis)


class BSplineVelocity(Transformation):
    """Cubic B-splines: ``velocity(p) = sum_j B(p / spacing - (j - 1)) * v_j`` along every axis.

    Args:
        spacing: voxels between control points, one number or one an axis.
        steps: squarings.
        integration_factor: of the grid that is integrated on.

    Raises:
        ValueError: when a spacing is no positive whole number.
    """

    def __init__(self, spacing: int | Sequence[int] = 2, steps: int = 12, integration_factor: int = 1) -> None:
        super().__init__(steps, integration_factor)
        spacings = (spacing,) if isinstance(spacing, int) else tuple(spacing)
        if not spacings or not all(isinstance(c, int) and c > 0 for c in spacings):
            raise ValueError(f"spacing must be whole numbers above 0, got {spacing}")
        self.spacing = spacings

    def lattice(self, size: Sequence[int]) -> tuple[int, ...]:
        """``ceil((n - 1) / spacing) + 3`` control points along each axis."""
        return tuple(-(-(n - 1) // c) + 3 for n, c in zip(size, self._spacings(size), strict=True))

    def dense(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        """One small matrix product an axis; see :meth:`Transformation.dense`."""
        values = self._checked(lattice_values, size)
        with full_precision(values.device):
            # The last axis first: then the large products run over contiguous rows.
            for axis, (n, c) in reversed(list(enumerate(zip(size, self._spacings(size), strict=True), 2))):
                matrix = _spline_weights(int(n), c).to(values)
                if axis == values.ndim - 1:
                    values = values @ matrix.T
                else:
                    rest = values.shape[axis + 1 :]
                    values = (matrix @ values.flatten(axis + 1)).unflatten(-1, rest)
        return values

    def carry(
        self, posterior: LowRankGaussian, size: Sequence[int], factor_per_axis: Sequence[float]
    ) -> LowRankGaussian:
        """See :meth:`Transformation.carry`."""
        return posterior.resized(self.lattice(size), factor_per_axis, spacing=self._spacings(size), origin=1.0)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"spacing={self.spacing}, {super().extra_repr()}"

    def _spacings(self, size: Sequence[int]) -> tuple[int, ...]:
        spacings = self.spacing * len(size) if len(self.spacing) == 1 else self.spacing
        if len(spacings) != len(size):
            raise ValueError(f"spacing {self.spacing} must be one number or one an axis of {tuple(size)}")
        return spacings


def build_transformation(
    name: str = "svf", steps: int = 12, control_spacing: int | Sequence[int] = 2, integration_factor: int = 1
) -> Transformation:
    """A transformation by name.

    Args:
        name: "svf", a velocity in every voxel, or "bspline", control points.
        steps: squarings.
        control_spacing: voxels between control points; of no effect for "svf".
        integration_factor: of the grid that is integrated on.

    Raises:
        ValueError: for an unknown name or a number out of range.
    """
    if check_choice("build_transformation", "name", name, ("svf", "bspline")) == "svf":
        return StationaryVelocity(steps, integration_factor)
    return BSplineVelocity(control_spacing, steps, integration_factor)


@lru_cache(maxsize=64)
def _spline_weights(size: int, spacing: int) -> Tensor:
    """(size, control points): the weight of every control point in every voxel, float64."""
    control = torch.arange(-(-(size - 1) // spacing) + 3, dtype=torch.float64) - 1
    return cubic_bspline(torch.arange(size, dtype=torch.float64)[:, None] / spacing - control)
