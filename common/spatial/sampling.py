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

On the CPU PyTorch's sampler has vectorised code for 2-D alone; :mod:`common.spatial.trilinear` does 3-D. And it shares
its work between threads by batch item only: a batch with fewer items than threads is therefore handed over as parts of
the output, each an item that looks into the same image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.spatial.exporting import exporting, sample_plainly
from common.spatial.trilinear import fits, trilinear, trilinear_backward

__all__ = ["PADDING", "padding_code", "sample_backward", "sample_forward", "sample_linear", "sampler_grid"]

#: Padding names and the sampler's codes for them.
PADDING = {"zeros": 0, "border": 1}

_FAR = 1e6  # voxels, outside of any image


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
    if exporting():
        return sample_plainly(image, ddf, padding)
    if torch.is_grad_enabled() and (image.requires_grad or ddf.requires_grad):
        result: Tensor = _SampleLinear.apply(image, ddf, code)
        return result
    return sample_forward(image, ddf, code)


def sample_forward(image: Tensor, ddf: Tensor, code: int) -> Tensor:
    """:func:`sample_linear` with the padding's code, and not to be differentiated; NaN where the field is."""
    if fits(image, ddf):
        return trilinear(image, ddf, code == PADDING["border"])
    if _leads_astray(ddf):
        filled, gaps = _filled(ddf)
        return sample_forward(image, filled, code).masked_fill_(gaps, float("nan"))
    return _sampler_forward(image, sampler_grid(ddf, image.shape[2:]), code)


def sample_backward(
    gradient: Tensor, image: Tensor, ddf: Tensor, code: int, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`sample_forward` in image and field; ``None`` for what is not wanted."""
    if fits(image, ddf):
        return trilinear_backward(gradient, image, ddf, code == PADDING["border"], wanted)
    if _leads_astray(ddf):
        filled, gaps = _filled(ddf)
        for_image, for_ddf = sample_backward(gradient.masked_fill(gaps, 0.0), image, filled, code, wanted)
        return for_image, None if for_ddf is None else for_ddf.masked_fill_(gaps, float("nan"))
    size = image.shape[2:]
    for_image, for_grid = _sampler_backward(gradient, image, sampler_grid(ddf, size), code, wanted)
    for_ddf = None
    if wanted[1]:
        for_ddf = torch.empty_like(ddf, memory_format=torch.contiguous_format)
        for axis, count in enumerate(size):
            torch.mul(for_grid[..., len(size) - 1 - axis], 2.0 / count, out=for_ddf[:, axis])
    return for_image if wanted[0] else None, for_ddf


def _leads_astray(ddf: Tensor) -> bool:
    """Whether a field on the CPU is not finite, which PyTorch's sampler follows out of the image, up to a crash."""
    if ddf.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    # The sum is quick, and nearly always enough to know.
    return not bool(torch.isfinite(ddf.sum())) and not bool(torch.isfinite(ddf).all())


def _filled(ddf: Tensor) -> tuple[Tensor, Tensor]:
    """A finite field that leaves the image where the given one does, and where that is NaN (B, 1, *S)."""
    return torch.nan_to_num(ddf, nan=0.0, posinf=_FAR, neginf=-_FAR), torch.isnan(ddf).any(1, keepdim=True)


def sampler_grid(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """Coordinates of ``x + ddf(x)`` for PyTorch's sampler: (B, *Sf, d), last axis first, the faces at -1 and 1."""
    dims = ddf.shape[1]
    grid = ddf.new_empty((ddf.shape[0], *ddf.shape[2:], dims))
    for axis in range(dims):
        count = ddf.shape[2 + axis]
        # In float64: the rounding of these few numbers would be seen in every voxel.
        positions = (2.0 * torch.arange(count, dtype=torch.float64, device=ddf.device) + 1.0) / size[axis] - 1.0
        positions = positions.to(ddf.dtype).view([-1 if k == axis else 1 for k in range(dims)])
        torch.add(positions, ddf[:, axis], alpha=2.0 / size[axis], out=grid[..., dims - 1 - axis])
    return grid


def _sampler_forward(image: Tensor, grid: Tensor, code: int) -> Tensor:
    """PyTorch's linear sampler for 2-D and 3-D: image (B, C, *Sm) at grid (B, *Sf, d). Not to be differentiated."""
    sampler = torch.grid_sampler_2d if grid.shape[-1] == 2 else torch.grid_sampler_3d
    parts = _parts(grid, max_parts=1024)
    if parts == 1:
        return sampler(image, grid, 0, code, False)
    moved = []
    for item in range(len(grid)):
        folded = _fold(grid[item], parts)
        result = sampler(image[item].expand(parts, *image.shape[1:]), folded, 0, code, False)
        moved.append(result.transpose(0, 1).reshape(1, image.shape[1], *grid.shape[1:-1]))
    return moved[0] if len(moved) == 1 else torch.cat(moved)


def _sampler_backward(
    gradient: Tensor, image: Tensor, grid: Tensor, code: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_sampler_forward` in image and grid; what is not wanted is not computed (and undefined)."""
    operators = torch.ops.aten
    backward = operators.grid_sampler_2d_backward if grid.shape[-1] == 2 else operators.grid_sampler_3d_backward
    # Each part adds up an image gradient of its own: as many copies as there are parts.
    parts = _parts(grid, max_parts=4 if wanted[0] else 1024)
    if parts == 1:
        for_image, for_grid = backward(gradient, image, grid, 0, code, False, list(wanted))
        return for_image, for_grid
    images, grids = [], []
    for item in range(len(grid)):
        folded = _fold(grid[item], parts)
        arrived = gradient[item].reshape(image.shape[1], parts, *folded.shape[1:-1]).transpose(0, 1)
        held = image[item].expand(parts, *image.shape[1:])
        for_image, for_grid = backward(arrived, held, folded, 0, code, False, list(wanted))
        images.append(for_image.sum(0, keepdim=True) if wanted[0] else for_image)
        grids.append(for_grid.view(1, *grid.shape[1:]) if wanted[1] else for_grid)
    if len(grid) == 1:
        return images[0], grids[0]
    return torch.cat(images) if wanted[0] else images[0], torch.cat(grids) if wanted[1] else grids[0]


def _parts(grid: Tensor, max_parts: int) -> int:
    """Into how many equal parts to cut each item's rows to occupy every thread: 1 on other devices than the CPU."""
    threads = torch.get_num_threads()
    if grid.device.type != "cpu" or len(grid) >= threads or torch.jit.is_tracing():
        return 1
    rows = grid[0, ..., 0, 0].numel()
    most = min(max_parts, rows // 64)  # fewer rows in a part are not worth the parting
    # Just enough to occupy all threads, or as near to it as may be.
    candidates = itertools.chain(range(threads, most + 1), range(min(most, threads - 1), 1, -1))
    return next((parts for parts in candidates if rows % parts == 0), 1)


def _fold(grid: Tensor, parts: int) -> Tensor:
    """Cut the rows of one item's grid (*S, d) in parts: (parts, rows, S[-1], 2) or (parts, rows, 1, S[-1], 3)."""
    row = (1,) * (grid.dim() - 3) + tuple(grid.shape[-2:])
    return grid.reshape(parts, -1, *row)


class _SampleLinear(torch.autograd.Function):
    """:func:`sample_linear` that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, ddf: Tensor, code: int) -> Tensor:
        ctx.save_for_backward(image, ddf)
        ctx.code = code
        return sample_forward(image, ddf, code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, ddf = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return *sample_backward(gradient, image, ddf, ctx.code, wanted), None
