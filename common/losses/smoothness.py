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
"""Penalties on the roughness of a displacement field."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.losses.checks import (
    as_float,
    check_choice,
    check_ddf,
    check_mask,
    check_spacing,
    full_precision,
    spacing_for,
)
from common.losses.stencils import Stencil, stencil_energy


class Diffusion(nn.Module):
    """Diffusion energy: how much neighbouring displacements differ, by forward differences.

    A forward difference sees every frequency; the central difference of ``monai.losses.DiffusionLoss`` gives 0 for a
    field that alternates between +1 and -1.

    With spacing s, component c and axis a the difference is ``(u[x + 1 along a] - u[x])_c * s_c / s_a``: displacement
    in mm over distance in mm. Without spacing all are voxels, which is the same for voxels of equal sides.

    Reductions, both published:

    - "mean" (VoxelMorph's and VFA's gradient loss): the squares are averaged over batch, components and places for
      each axis, then over the axes.
    - "frobenius" (GraDIRN): the squares are summed over components and axes, the squared norm of the displacement's
      Jacobian, and averaged over batch and voxels; the difference beyond the last voxel is 0. About d² times as much.

    An axis of one voxel has no differences and gives 0.

    Args:
        penalty: "l2", squares, or "l1", absolute values.
        spacing: voxel size along each axis of the array in mm, or one number for all.
        reduction: "mean" or "frobenius".
        weight_at: where a weight map applies: "edge" takes the mean of the two voxels that a difference joins, so that
            flipping an image changes nothing; "upper" the voxel of higher index, as the published TransMorphSPR.

    Raises:
        ValueError: for an unknown choice or a spacing that is not positive.
    """

    def __init__(
        self,
        penalty: str = "l2",
        spacing: Sequence[float] | float | None = None,
        reduction: str = "mean",
        *,
        weight_at: str = "edge",
    ) -> None:
        super().__init__()
        self.penalty = check_choice("Diffusion", "penalty", penalty, ("l1", "l2"))
        self.spacing = check_spacing("Diffusion", spacing)
        self.reduction = check_choice("Diffusion", "reduction", reduction, ("mean", "frobenius"))
        self.weight_at = check_choice("Diffusion", "weight_at", weight_at, ("edge", "upper"))

    def forward(self, ddf: Tensor, weight: Tensor | None = None) -> Tensor:
        """The energy, with no unit.

        Args:
            ddf: (B, d, *S), voxels; a velocity field does as well.
            weight: (B or 1, d or 1, *S), multiplies the penalty of each difference; may need a gradient too.

        Returns:
            a scalar, float32 (float64 for a float64 field).

        Raises:
            TypeError: when an argument is no tensor.
            ValueError: when ``ddf`` is no field, or weight or spacing do not fit it.
        """
        dims = check_ddf("Diffusion", ddf)
        spacing = spacing_for("Diffusion", self.spacing, dims)
        scales = [self._scale(ddf.shape, axis) for axis in range(dims)]
        with full_precision(ddf.device):
            field = _times(as_float(ddf), spacing)
            if weight is not None:
                check_mask("Diffusion", weight, ddf.shape)
                return self._weighted(field, as_float(weight), spacing, scales)
            stencils = [
                Stencil.difference(dims, axis, scales[axis] / spacing[axis] ** self._power) for axis in range(dims)
            ]
            return stencil_energy(field, stencils, absolute=self.penalty == "l1")

    @property
    def _power(self) -> int:
        return 1 if self.penalty == "l1" else 2

    def _scale(self, shape: torch.Size, axis: int) -> float:
        """What one difference along ``axis`` contributes to the reduction."""
        batch, dims, *size = shape
        if self.reduction == "frobenius":
            return 1.0 / (batch * math.prod(size))
        places = batch * dims * math.prod(size) // size[axis] * (size[axis] - 1)
        return 1.0 / (dims * places) if places else 0.0

    def _weighted(self, field: Tensor, weight: Tensor, spacing: tuple[float, ...], scales: list[float]) -> Tensor:
        """The energy with a weight map, left to autograd, as the map has a gradient too."""
        total = field.new_zeros(())
        for axis, (size, scale) in enumerate(zip(spacing, scales, strict=True)):
            step = field.diff(dim=axis + 2) / size
            here = weight.narrow(axis + 2, 1, weight.shape[axis + 2] - 1)
            if self.weight_at == "edge":
                here = 0.5 * (here + weight.narrow(axis + 2, 0, weight.shape[axis + 2] - 1))
            total = total + scale * ((step.abs() if self.penalty == "l1" else step * step) * here).sum()
        return total

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"penalty={self.penalty!r}, spacing={self.spacing}, reduction={self.reduction!r}"


class BendingEnergy(nn.Module):
    """Bending energy: squared second derivatives, 0 for every affine map.

    The sum of mean(u_aa²) over the axes and 2·mean(u_ab²) over their pairs; each mean is over batch, components and the
    places that have the neighbours. u_aa is [1, -2, 1]; u_ab is the difference along one axis of the difference along
    the other, so that four touching voxels suffice. ``monai.losses.BendingEnergyLoss`` (1.6) is the same for quadratic
    fields; its mixed term spans three voxels and is blind to fields that alternate.

    With spacing s, component c is ``u_c * s_c / (s_a * s_b)``: displacement in mm over mm², so the energy is in mm⁻².
    Without spacing, and for s = 1, voxels⁻². An axis too short for a term leaves that term out.

    Args:
        spacing: voxel size along each axis of the array in mm, or one number for all.

    Raises:
        ValueError: for a spacing that is not positive.
    """

    def __init__(self, spacing: Sequence[float] | float | None = None) -> None:
        super().__init__()
        self.spacing = check_spacing("BendingEnergy", spacing)

    def forward(self, ddf: Tensor) -> Tensor:
        """The energy.

        Args:
            ddf: (B, d, *S), voxels.

        Returns:
            a scalar, float32 (float64 for a float64 field).

        Raises:
            TypeError: when ``ddf`` is no tensor.
            ValueError: when ``ddf`` is no field, or the spacing does not fit it.
        """
        dims = check_ddf("BendingEnergy", ddf)
        spacing = spacing_for("BendingEnergy", self.spacing, dims)
        stencils = []
        for first in range(dims):
            for second in range(first, dims):
                stencil = Stencil.second_difference(dims, first, second)
                places = ddf.shape[0] * dims * stencil.places(ddf.shape[2:])
                scale = (1 if first == second else 2) / (spacing[first] * spacing[second]) ** 2
                stencils.append(stencil.times(scale / places if places else 0.0))
        with full_precision(ddf.device):
            return stencil_energy(_times(as_float(ddf), spacing), stencils)

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"spacing={self.spacing}"


def _times(ddf: Tensor, spacing: tuple[float, ...]) -> Tensor:
    """The field in mm along every axis; the field itself where that is the same."""
    if all(size == 1.0 for size in spacing):
        return ddf
    return ddf * ddf.new_tensor(spacing).view(1, -1, *[1] * len(spacing))
