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
"""Linear sampling at displaced voxels: the one kernel that warping, integrating and composing stand on.

PyTorch's sampler wants normalised, channels-last, reversed coordinates. They are written here in one pass an axis, in
the ``align_corners=False`` normalisation: for voxel displacements both give the same positions, but this one is defined
on axes of size 1 too. The coordinates are rebuilt in the backward pass, so nothing but the image and the field is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["PADDING", "sample_linear"]

#: Padding names and the sampler's codes for them.
PADDING = {"zeros": 0, "border": 1}


def padding_code(padding: str) -> int:
    """The sampler's code of a padding.

    Raises:
        ValueError: when there is no such padding.
    """
    if padding not in PADDING:
        raise ValueError(f"padding must be one of {sorted(PADDING)}, got {padding!r}")
    return PADDING[padding]


def sample_linear(image: Tensor, ddf: Tensor, padding: str) -> Tensor:
    """``image(x + ddf(x))`` by linear interpolation, differentiable once in both.

    Args:
        image: (B, C, *Sm), of the dtype of ``ddf``.
        ddf: (B, d, *Sf), in voxels, float32 or float64.
        padding: ``"border"`` or ``"zeros"``.

    Returns:
        (B, C, *Sf), of the dtype of ``ddf``.
    """
    code = padding_code(padding)
    if torch.is_grad_enabled() and (image.requires_grad or ddf.requires_grad):
        result: Tensor = _SampleLinear.apply(image, ddf, code)
        return result
    return _sample(image, sampler_grid(ddf, image.shape[2:]), code)


def sampler_grid(ddf: Tensor, size: torch.Size) -> Tensor:
    """Coordinates of ``x + ddf(x)`` for PyTorch's sampler: (B, *Sf, d), last axis first, the faces at -1 and 1."""
    dims = ddf.shape[1]
    grid = ddf.new_empty((ddf.shape[0], *ddf.shape[2:], dims))
    for axis in range(dims):
        count = ddf.shape[2 + axis]
        # In float64: the rounding of these few numbers would be seen in every voxel.
        positions = (2.0 * torch.arange(count, dtype=torch.float64, device=ddf.device) + 1.0) / size[axis] - 1.0
        positions = positions.to(ddf.dtype).view([-1 if k == axis else 1 for k in range(dims)])
        grid[..., dims - 1 - axis] = torch.add(positions, ddf[:, axis], alpha=2.0 / size[axis])
    return grid


def _sample(image: Tensor, grid: Tensor, code: int) -> Tensor:
    """PyTorch's linear sampler for 2-D and 3-D."""
    sampler = torch.grid_sampler_2d if grid.shape[-1] == 2 else torch.grid_sampler_3d
    return sampler(image, grid, 0, code, False)


def _sample_backward(
    gradient: Tensor, image: Tensor, grid: Tensor, code: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_sample` in image and grid; what is not wanted is not computed."""
    operators = torch.ops.aten
    backward = operators.grid_sampler_2d_backward if grid.shape[-1] == 2 else operators.grid_sampler_3d_backward
    gradients: tuple[Tensor, Tensor] = backward(gradient, image, grid, 0, code, False, list(wanted))
    return gradients


def _to_ddf(grid_gradient: Tensor, size: torch.Size) -> Tensor:
    """Gradient in the sampler's coordinates (B, *S, d) to gradient in the field (B, d, *S)."""
    dims = grid_gradient.shape[-1]
    result = grid_gradient.new_empty((grid_gradient.shape[0], dims, *grid_gradient.shape[1:-1]))
    for axis in range(dims):
        result[:, axis] = grid_gradient[..., dims - 1 - axis]
        result[:, axis] *= 2.0 / size[axis]
    return result


class _SampleLinear(torch.autograd.Function):
    """:func:`sample_linear` that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, ddf: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(image, ddf)
        ctx.code = code
        return _sample(image, sampler_grid(ddf, image.shape[2:]), code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, ddf = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grid = sampler_grid(ddf, image.shape[2:])
        for_image, for_grid = _sample_backward(gradient, image, grid, ctx.code, wanted)
        return for_image if wanted[0] else None, _to_ddf(for_grid, image.shape[2:]) if wanted[1] else None, None
