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
"""Sums of squared (or absolute) finite differences, with their gradient, in little memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from common.losses.gradients import scaled_gradient

# Voxels worked on at a time on a CPU, so that the maps stay in its cache.
_PIECE_CPU = 2**18


@dataclass(frozen=True)
class Stencil:
    """A finite difference: a weighted sum of neighbours, and what its square counts.

    Args:
        points: (offset along every axis, weight) pairs, offsets not negative.
        scale: factor of the penalty.
    """

    points: tuple[tuple[tuple[int, ...], float], ...]
    scale: float

    @classmethod
    def difference(cls, dims: int, axis: int, scale: float = 1.0) -> Stencil:
        """The forward difference u[x + 1] - u[x] along an axis."""
        return cls(((_offset(dims, axis), 1.0), (_offset(dims), -1.0)), scale)

    @classmethod
    def second_difference(cls, dims: int, first: int, second: int, scale: float = 1.0) -> Stencil:
        """The second difference along two axes: [1, -2, 1] along one, four touching voxels along two."""
        if first == second:
            return cls(((_offset(dims, first, first), 1.0), (_offset(dims, first), -2.0), (_offset(dims), 1.0)), scale)
        corners = ((first, second), 1.0), ((first,), -1.0), ((second,), -1.0), ((), 1.0)
        return cls(tuple((_offset(dims, *axes), weight) for axes, weight in corners), scale)

    def times(self, scale: float) -> Stencil:
        """The same difference, counting ``scale`` times as much."""
        return replace(self, scale=self.scale * scale)

    def size(self, size: Sequence[int]) -> list[int]:
        """How many places along each axis have all neighbours; 0 where none has."""
        reach = [max(offset[axis] for offset, _ in self.points) for axis in range(len(size))]
        return [max(n - r, 0) for n, r in zip(size, reach, strict=True)]

    def places(self, size: Sequence[int]) -> int:
        """How many places have all neighbours."""
        return math.prod(self.size(size))


def stencil_energy(field: Tensor, stencils: Sequence[Stencil], absolute: bool = False) -> Tensor:
    """The sum of scale * penalty(difference) over stencils, channels and the places that have all neighbours.

    Args:
        field: (B, C, *S) floating.
        stencils: the differences.
        absolute: penalise the absolute value rather than the square.

    Returns:
        a scalar. Its gradient is computed along with it; it cannot be differentiated twice.
    """
    needed = torch.is_grad_enabled() and field.requires_grad
    return _StencilEnergy.apply(field, tuple(stencils), absolute, needed)


class _StencilEnergy(torch.autograd.Function):
    """The energy; a scalar's gradient is known up to a factor in the forward pass, so that nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, field: Tensor, stencils: tuple[Stencil, ...], absolute: bool, needed: bool) -> Tensor:
        total = field.new_zeros(())
        gradient = torch.zeros_like(field, memory_format=torch.contiguous_format) if needed else None
        flat = field.detach().flatten(0, 1)
        flat_gradient = None if gradient is None else gradient.flatten(0, 1)
        for items in _pieces(flat):
            slope = None if flat_gradient is None else flat_gradient[items]
            for stencil in stencils:
                if stencil.scale and stencil.places(flat.shape[1:]):
                    total += _one(flat[items], stencil, absolute, slope)
        if gradient is not None:
            ctx.save_for_backward(field, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        field, gradient = ctx.saved_tensors
        return scaled_gradient(upstream, gradient, field), None, None, None


def _one(field: Tensor, stencil: Stencil, absolute: bool, gradient: Tensor | None) -> Tensor:
    """One stencil's energy on (N, *S); adds its gradient to ``gradient``."""
    (offset, weight), *others = stencil.points
    size = stencil.size(field.shape[1:])
    difference = _window(field, offset, size) * weight
    for offset, weight in others:
        difference.add_(_window(field, offset, size), alpha=weight)
    if gradient is not None:
        slope = torch.sign(difference) if absolute else difference
        factor = stencil.scale * (1 if absolute else 2)
        for offset, weight in stencil.points:
            _window(gradient, offset, size).add_(slope, alpha=weight * factor)
    energy = difference.abs_() if absolute else difference.square_()
    return stencil.scale * energy.sum()


def _window(field: Tensor, offset: Sequence[int], size: Sequence[int]) -> Tensor:
    """The part of (N, *S) that starts at ``offset``."""
    for axis, (start, length) in enumerate(zip(offset, size, strict=True), 1):
        field = field.narrow(axis, start, length)
    return field


def _pieces(flat: Tensor) -> list[slice]:
    """Cut (N, *S) along N on a CPU; a GPU takes all at once."""
    count = flat.shape[0]
    step = max(1, _PIECE_CPU // flat[0].numel()) if flat.device.type == "cpu" else count
    return [slice(start, start + step) for start in range(0, count, step)]


def _offset(dims: int, *axes: int) -> tuple[int, ...]:
    """One step along each of ``axes``."""
    return tuple(axes.count(axis) for axis in range(dims))
