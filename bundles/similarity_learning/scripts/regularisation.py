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
"""The energy of a velocity's roughness, for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.losses.checks import full_precision
from common.spatial.grid import as_field

__all__ = ["DifferenceEnergy"]


class DifferenceEnergy(nn.Module):
    """Half the weighted sum of squared forward differences, over components, axes and voxels.

    Differences are between neighbours on the lattice of parameters, not divided by their distance. A sum, not a mean:
    it grows with the size of the image, as the data energy does.

    Args:
        weight: factor of the energy.
        edge_weight: how much the last difference of every axis counts. 1 is a plain sum; 2 is as published, where the
            array of differences is padded by repeating it.
    """

    def __init__(self, weight: float = 1.8, edge_weight: float = 1.0) -> None:
        super().__init__()
        self.weight, self.edge_weight = weight, edge_weight

    def forward(self, velocity: Tensor) -> Tensor:
        """The energy of each image.

        Args:
            velocity: (B, d, *L), velocities or control points.

        Returns:
            (B,), float32 (float64 if the velocity is).
        """
        velocity = as_field(velocity, "velocity")
        with full_precision(velocity.device):
            result: Tensor = _Energy.apply(velocity, self.weight, self.edge_weight)
            return result

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"weight={self.weight}, edge_weight={self.edge_weight}"


class _Energy(torch.autograd.Function):
    """Keeps the velocity alone; the gradient is linear in it."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, weight: float, edge_weight: float) -> Tensor:
        ctx.save_for_backward(velocity)
        ctx.weight, ctx.edge_weight = weight, edge_weight
        total = velocity.new_zeros(len(velocity))
        for axis in range(2, velocity.ndim):
            if velocity.shape[axis] < 2:
                continue
            step = velocity.diff(dim=axis).square_()
            total += step.flatten(1).sum(1)
            if edge_weight != 1:
                total += (edge_weight - 1) * step.narrow(axis, step.shape[axis] - 1, 1).flatten(1).sum(1)
        return 0.5 * weight * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (velocity,) = ctx.saved_tensors
        gradient = torch.zeros_like(velocity)
        for axis in range(2, velocity.ndim):
            count = velocity.shape[axis] - 1
            if count < 1:
                continue
            step = velocity.diff(dim=axis)
            if ctx.edge_weight != 1:
                step.narrow(axis, count - 1, 1).mul_(ctx.edge_weight)
            gradient.narrow(axis, 1, count).add_(step)
            gradient.narrow(axis, 0, count).sub_(step)
        scale = (ctx.weight * upstream).view(-1, *(1,) * (velocity.ndim - 1))
        return gradient.mul_(scale), None, None
