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
"""Local correlation of two feature maps: how well each voxel of one fits each neighbour in the other."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.networks.neighbourhood import (
    correlate,
    correlate_backward,
    correlate_plainly,
    neighbour_offsets,
    row_slabs,
    window,
)
from common.spatial.exporting import exporting

__all__ = ["both_ways", "local_correlation"]

_MODES = {"zeros": "constant", "border": "replicate"}


def local_correlation(a: Tensor, b: Tensor, radius: int = 1, padding: str = "zeros") -> Tensor:
    """``out[n](p) = C^-0.5 * sum_c a_c(p) * b_c(p + o_n)`` over the offsets of a cube, the first axis slowest.

    The backward pass keeps the two maps only. Sums run in float32 (float64 if a map is), also under autocast.
    Source: Dosovitskiy et al., FlowNet (ICCV 2015), here with every displacement of a small cube.

    Args:
        a: (B, C, *S), two or three axes.
        b: (B, C, *S).
        radius: of the cube, in voxels.
        padding: of ``b`` outside its grid, "zeros" or "border".

    Returns:
        (B, (2 * radius + 1)^d, *S), of the dtype of the maps.

    Raises:
        ValueError: when the shapes disagree (both are named), the radius is negative or the padding unknown.
    """
    if a.shape != b.shape or a.ndim not in (4, 5):
        raise ValueError(f"a and b must both be (B, C, *S), 2-D or 3-D, got {tuple(a.shape)} and {tuple(b.shape)}")
    if radius < 0:
        raise ValueError(f"radius must not be negative, got {radius}")
    if padding not in _MODES:
        raise ValueError(f"padding must be one of {sorted(_MODES)}, got {padding!r}")
    if exporting():
        halo = F.pad(b.float(), (radius,) * (2 * (b.ndim - 2)), mode=_MODES[padding])
        return (correlate_plainly(a.float(), halo, radius) * a.shape[1] ** -0.5).to(a.dtype)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        result: Tensor = _LocalCorrelation.apply(a, b, radius, _MODES[padding])
        return result
    return _forward(a, b, radius, _MODES[padding])


def both_ways(correlation: Tensor) -> Tensor:
    """``local_correlation(b, a)`` out of ``local_correlation(a, b)``, where both are padded with zeros.

    A pair of voxels has one product, whichever of the two is the centre: ``out[o](p) = correlation[-o](p + o)``. The
    reverse of that is the same again, and so is its gradient.

    Args:
        correlation: (B, (2r+1)^d, *S).

    Returns:
        (B, (2r+1)^d, *S).

    Raises:
        ValueError: when the number of channels is not that of a cube.
    """
    dims, channels = correlation.ndim - 2, int(correlation.shape[1])
    side = round(channels ** (1 / dims))
    if side**dims != channels or side % 2 == 0:
        raise ValueError(f"{channels} channels are not an odd number to the power of {dims}")
    if exporting():
        return _exchange_plainly(correlation, side // 2)
    if torch.is_grad_enabled() and correlation.requires_grad:
        result: Tensor = _BothWays.apply(correlation, side // 2)
        return result
    return _exchange(correlation, side // 2)


def _precision(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32


def _with_halo(b: Tensor, start: int, stop: int, radius: int, mode: str, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Rows ``start`` to ``stop`` of a map with their neighbours, and the rows of the map that this holds."""
    first, last = max(start - radius, 0), min(stop + radius, b.shape[2])
    pads = [radius] * (2 * (b.ndim - 3)) + [first - (start - radius), stop + radius - last]
    return F.pad(b[:, :, first:last].to(dtype), pads, mode=mode), first, last


def _forward(a: Tensor, b: Tensor, radius: int, mode: str) -> Tensor:
    dtype, scale = _precision(a, b), a.shape[1] ** -0.5
    channels = (2 * radius + 1) ** (a.ndim - 2)
    result = a.new_empty((len(a), channels, *a.shape[2:]), dtype=torch.promote_types(a.dtype, b.dtype))
    for start, stop in row_slabs(a, radius):
        halo, _, _ = _with_halo(b, start, stop, radius, mode, dtype)
        torch.mul(correlate(a[:, :, start:stop].to(dtype), halo, radius), scale, out=result[:, :, start:stop])
    return result


def _fold(gradient: Tensor, radius: int, missing: tuple[int, int], mode: str) -> Tensor:
    """The gradient of a map with halo as one of the map: what the border was repeated to goes back to it."""
    pads = [missing] + [(radius, radius)] * (gradient.ndim - 3)
    for axis, (before, after) in enumerate(pads, start=2):
        count = gradient.shape[axis] - before - after
        inside = gradient.narrow(axis, before, count)
        if mode == "replicate" and before:
            inside.narrow(axis, 0, 1).add_(gradient.narrow(axis, 0, before).sum(axis, keepdim=True))
        if mode == "replicate" and after:
            rest = gradient.narrow(axis, before + count, after)
            inside.narrow(axis, count - 1, 1).add_(rest.sum(axis, keepdim=True))
        gradient = inside
    return gradient


def _exchange(correlation: Tensor, radius: int) -> Tensor:
    result = torch.zeros_like(correlation)
    channels = correlation.shape[1]
    for n, offset in enumerate(neighbour_offsets(radius, correlation.ndim - 2).tolist()):
        source, target = correlation[:, channels - 1 - n], result[:, n]
        for axis, (step, size) in enumerate(zip(offset, correlation.shape[2:], strict=True), start=1):
            count = max(size - abs(step), 0)
            source = source.narrow(axis, min(max(step, 0), size), count)
            target = target.narrow(axis, min(max(-step, 0), size), count)
        target.copy_(source)
    return result


def _exchange_plainly(correlation: Tensor, radius: int) -> Tensor:
    """The same as :func:`_exchange`, without writing into parts of a tensor."""
    wide = F.pad(correlation, (radius,) * (2 * (correlation.ndim - 2)))
    reverse = reversed(wide.unbind(1))
    offsets = itertools.product(range(-radius, radius + 1), repeat=correlation.ndim - 2)
    windows = [window(one, offset, radius) for one, offset in zip(reverse, offsets, strict=True)]
    return torch.stack(windows, dim=1)


class _LocalCorrelation(torch.autograd.Function):
    """:func:`local_correlation`, which keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, radius: int, mode: str) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.radius, ctx.mode = radius, mode
        return _forward(a, b, radius, mode)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        radius, mode, dtype, scale = ctx.radius, ctx.mode, _precision(a, b), a.shape[1] ** -0.5
        for_a = torch.empty_like(a, memory_format=torch.contiguous_format)
        for_b = torch.zeros_like(b, dtype=dtype, memory_format=torch.contiguous_format)
        for start, stop in row_slabs(a, radius):
            halo, first, last = _with_halo(b, start, stop, radius, mode, dtype)
            rows = slice(start, stop)
            given = gradient[:, :, rows].to(dtype) * scale
            for_rows, for_halo = correlate_backward(given, a[:, :, rows].to(dtype), halo, radius)
            for_a[:, :, rows] = for_rows
            missing = (first - (start - radius), stop + radius - last)
            for_b[:, :, first:last] += _fold(for_halo, radius, missing, mode)
        return for_a, for_b.to(b.dtype), None, None


class _BothWays(torch.autograd.Function):
    """:func:`both_ways`, which keeps nothing."""

    @staticmethod
    def forward(ctx: Any, correlation: Tensor, radius: int) -> Tensor:
        ctx.radius = radius
        return _exchange(correlation, radius)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.radius), None
