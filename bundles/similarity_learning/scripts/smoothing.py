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
"""Sobolev smoothing of velocities, and its two gradients.

The smoothing makes white samples of q(v) into smooth velocities. Its published gradient is that of the identity
("straight through"), which makes the update of q(v) no gradient of the stated energy but one in a Sobolev metric.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.losses.checks import check_choice
from common.spatial.grid import as_field

__all__ = ["SobolevSmoothing", "smoothed", "sobolev_kernel"]


def sobolev_kernel(half_width: int = 3, strength: float = 0.5) -> tuple[float, ...]:
    """The middle row of (I - strength * L)^-1, divided by its sum; L is the 1-D Laplacian [1, -2, 1] with 0 outside.

    Args:
        half_width: taps on either side of the middle.
        strength: how much is smoothed; 0 is none.

    Returns:
        2 * half_width + 1 taps that add up to 1.

    Raises:
        ValueError: when a number is negative.
    """
    if half_width < 0 or strength < 0:
        raise ValueError(f"half_width and strength must not be negative, got {half_width} and {strength}")
    count = 2 * half_width + 1
    neighbours = torch.ones(count - 1, dtype=torch.float64)
    laplacian = torch.diag(neighbours, 1) + torch.diag(neighbours, -1) - 2 * torch.eye(count, dtype=torch.float64)
    row = torch.linalg.inv(torch.eye(count, dtype=torch.float64) - strength * laplacian)[half_width]
    return tuple((row / row.sum()).tolist())


class SobolevSmoothing(nn.Module):
    """Smooth a field along each axis with the Sobolev kernel; outside of the grid the border is repeated.

    Args:
        half_width: taps on either side of the middle; 0 is no smoothing.
        strength: weight of the Laplacian.
        gradient: "straight_through" hands gradients on unchanged, as published; "exact" applies the transposed
            operator to them.

    Raises:
        ValueError: for a negative number or an unknown gradient.
    """

    def __init__(self, half_width: int = 3, strength: float = 0.5, gradient: str = "straight_through") -> None:
        super().__init__()
        self.half_width, self.strength = half_width, strength
        self.gradient = check_choice("SobolevSmoothing", "gradient", gradient, ("straight_through", "exact"))
        self.taps = sobolev_kernel(half_width, strength)[half_width:]

    def forward(self, velocity: Tensor) -> Tensor:
        """The smooth field.

        Args:
            velocity: (B, d, *L).

        Returns:
            (B, d, *L), float32 (float64 if the field is).
        """
        velocity = as_field(velocity, "velocity")
        if self.half_width == 0:
            return velocity
        return smoothed(velocity, self.taps, self.gradient == "exact")

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"half_width={self.half_width}, strength={self.strength}, gradient={self.gradient!r}"


def smoothed(values: Tensor, taps: tuple[float, ...], exact: bool = True) -> Tensor:
    """Values smoothed along every axis, the border repeated outside of the grid.

    Args:
        values: (B, C, *L).
        taps: half of a symmetric kernel, the middle first.
        exact: gradients are those of this; else they are handed on unchanged.

    Returns:
        (B, C, *L).
    """
    result: Tensor = _Smooth.apply(values, taps, exact)
    return result


class _Smooth(torch.autograd.Function):
    """Keeps nothing for its backward pass."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, taps: tuple[float, ...], exact: bool) -> Tensor:
        ctx.taps, ctx.exact = taps, exact
        for axis in range(2, velocity.ndim):
            velocity = _along(velocity, taps, axis)
        return velocity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.exact:
            for axis in range(2, gradient.ndim):
                gradient = _along_transposed(gradient, ctx.taps, axis)
        return gradient, None, None


def _along(values: Tensor, taps: tuple[float, ...], axis: int) -> Tensor:
    """Each tap adds the shifted field; what it would take from outside of the grid is the border."""
    count = values.shape[axis]
    result = values * taps[0]
    for shift, tap in enumerate(taps[1:], 1):
        inside, outside = max(count - shift, 0), min(shift, count)
        result.narrow(axis, outside, inside).add_(values.narrow(axis, 0, inside), alpha=tap)
        result.narrow(axis, 0, inside).add_(values.narrow(axis, outside, inside), alpha=tap)
        result.narrow(axis, 0, outside).add_(values.narrow(axis, 0, 1), alpha=tap)
        result.narrow(axis, inside, outside).add_(values.narrow(axis, count - 1, 1), alpha=tap)
    return result


def _along_transposed(gradient: Tensor, taps: tuple[float, ...], axis: int) -> Tensor:
    """The transpose of :func:`_along`: what was taken from the border goes back to it."""
    count = gradient.shape[axis]
    result = gradient * taps[0]
    for shift, tap in enumerate(taps[1:], 1):
        inside, outside = max(count - shift, 0), min(shift, count)
        result.narrow(axis, 0, inside).add_(gradient.narrow(axis, outside, inside), alpha=tap)
        result.narrow(axis, outside, inside).add_(gradient.narrow(axis, 0, inside), alpha=tap)
        result.narrow(axis, 0, 1).add_(gradient.narrow(axis, 0, outside).sum(axis, keepdim=True), alpha=tap)
        result.narrow(axis, count - 1, 1).add_(
            gradient.narrow(axis, inside, outside).sum(axis, keepdim=True), alpha=tap
        )
    return result
