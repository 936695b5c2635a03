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
"""Trilinear sampling on the CPU, for which PyTorch's own sampler has scalar code only.

The work goes in blocks of voxels that stay in the cache, as a few vectorised passes and one gather for each of the
eight corners. The image is first widened by a rim, two voxels wide: held to the rim, every position
has its corners in memory at fixed distances from the lowest one, and both paddings, with their gradients, follow from
what is in the rim.

On one thread a block is small enough for the cache; on several it is as large as PyTorch needs to share every pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["fits", "trilinear", "trilinear_backward"]

# Voxels a block. PyTorch shares a pass between threads from 2**15 on; Python threads that take whole small blocks were
# measured too, and stood in each other's way.
_BLOCK, _SHARED_BLOCK = 2**15 - 1, 2**17
_BEFORE, _BEHIND = 2, 2  # width of the rim


def fits(image: Tensor, ddf: Tensor) -> bool:
    """Whether these functions can serve: 3-D, on the CPU, not traced, and few enough voxels for 32-bit indices."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or image.dim() != 5 or image.device.type != "cpu":
        return False
    return min(image.numel(), ddf.numel()) > 0 and math.prod(_widened(image.shape[2:])) < 2**31


def trilinear(image: Tensor, ddf: Tensor, border: bool) -> Tensor:
    """``image(x + ddf(x))``: image (B, C, *Sm), ddf (B, 3, *Sf) -> (B, C, *Sf). Not to be differentiated."""
    size, offsets = image.shape[2:], _offsets(image.shape[2:])
    moved = ddf.new_empty((len(ddf), image.shape[1], *ddf.shape[2:]))
    for item in range(len(ddf)):
        table, result = _widen(image[item], border), moved[item].flatten(1)

        def work(here: slice, base: Tensor, parts: list[Tensor], table: Tensor, result: Tensor) -> None:
            for values, target in zip(table, result, strict=True):
                target[here] = _mean(_corner_reader(values[None], base), offsets, parts)

        _in_blocks(work, ddf[item], size, table, result)
    return moved


def trilinear_backward(
    gradient: Tensor, image: Tensor, ddf: Tensor, border: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`trilinear` in image and field; ``None`` for what is not wanted."""
    size, offsets = image.shape[2:], _offsets(image.shape[2:])
    for_image = torch.empty_like(image, memory_format=torch.contiguous_format) if wanted[0] else None
    for_ddf = torch.empty_like(ddf, memory_format=torch.contiguous_format) if wanted[1] else None

    def work(
        here: slice,
        base: Tensor,
        parts: list[Tensor],
        given: Tensor,
        table: Tensor | None,
        result: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        if table is not None and result is not None:
            # The slopes are linear in the corners: weighted by what arrived, all channels are one.
            _, *slopes = _slopes(_corner_reader(table, base, given[:, here]), offsets, parts)
            for target, slope in zip(result, slopes, strict=True):
                target[here] = slope
        if sums is not None:
            index = base.long()
            for total, arrived in zip(sums, given, strict=True):
                _spread(arrived[here], total, index, offsets, parts)

    for item in range(len(ddf)):
        table, result, sums = None, None, None
        if for_ddf is not None:
            table, result = _widen(image[item], border), for_ddf[item].flatten(1)
        if for_image is not None:
            sums = image.new_zeros(image.shape[1], math.prod(_widened(size)))
        _in_blocks(work, ddf[item], size, gradient[item].flatten(1), table, result, sums)
        if for_image is not None and sums is not None:
            for_image[item] = _narrow(sums, size, border)
    return for_image, for_ddf


def _in_blocks(work: Callable[..., None], ddf: Tensor, size: Sequence[int], *tensors: Tensor | None) -> None:
    """Call ``work(voxels, base, parts, *tensors)`` for all blocks of ddf (3, *Sf).

    A block is a slice of the flat voxels; base and parts are what :func:`_locate` finds for it.
    """
    width = ddf.shape[-1]
    field = ddf.reshape(3, -1, width)
    step = max(1, (_BLOCK if torch.get_num_threads() == 1 else _SHARED_BLOCK) // width)
    # In this mode tensors of any mode may be written to.
    with torch.inference_mode():
        for start in range(0, field.shape[1], step):
            rows = field[:, start : start + step]
            here = slice(start * width, (start + rows.shape[1]) * width)
            work(here, *_locate(rows, start, ddf.shape[2], size), *tensors)


def _locate(rows: Tensor, start: int, height: int, size: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The lowest corner around ``x + ddf(x)``.

    Args:
        rows: (3, n, width), rows of the field along its last axis.
        start: number of the first of them.
        height: rows in a slice of the field.
        size: of the image.

    Returns:
        indices into the widened image (n * width,), int32, and how far the positions are from that corner, by axis.
    """
    number = torch.arange(start, start + rows.shape[1]).unsqueeze(1)
    own = (number // height, number % height, torch.arange(rows.shape[2]))
    base, parts = torch.zeros((), dtype=torch.int32), []
    for shift, place, count, wide in zip(rows, own, size, _widened(size), strict=True):
        position = (shift + (place + _BEFORE).to(shift.dtype)).clamp_(0, count + _BEFORE)
        low = position.floor()
        parts.append(position.sub_(low).flatten())
        base = low.int().add_(base * wide)
    # Of a position that is no number the index may be any; what is found there becomes no number by its part.
    last = math.prod(_widened(size)) - 1 - _offsets(size)[-1]
    return base.clamp_(0, last).flatten(), parts


def _widened(size: Sequence[int]) -> list[int]:
    return [count + _BEFORE + _BEHIND for count in size]


def _offsets(size: Sequence[int]) -> list[int]:
    """From the lowest corner to all eight, in the widened image's memory; the last axis varies fastest."""
    _, height, width = _widened(size)
    return [z * height * width + y * width + x for z, y, x in itertools.product((0, 1), repeat=3)]


def _widen(image: Tensor, border: bool) -> Tensor:
    """Put the rim around image (C, *Sm), and flatten: (C, widened voxels)."""
    rim = (_BEFORE, _BEHIND) * 3
    return torch.nn.functional.pad(image.unsqueeze(0), rim, "replicate" if border else "constant")[0].flatten(1)


def _narrow(total: Tensor, size: Sequence[int], border: bool) -> Tensor:
    """The reverse of :func:`_widen` for gradients: a repeated voxel gets what its copies in the rim got."""
    total = total.view(-1, *_widened(size))
    for axis, count in enumerate(size, start=1):
        if border:
            total.select(axis, _BEFORE).add_(total.narrow(axis, 0, _BEFORE).sum(axis))
            total.select(axis, _BEFORE + count - 1).add_(total.narrow(axis, _BEFORE + count, _BEHIND).sum(axis))
        total = total.narrow(axis, _BEFORE, count)
    return total


def _corner_reader(table: Tensor, base: Tensor, weights: Tensor | None = None) -> Callable[[int], Tensor]:
    """A function that looks a corner up: of table (C, widened voxels) at base (n,), summed with weights (C, n)."""

    def read(offset: int) -> Tensor:
        corner = table[0, offset:].index_select(0, base)
        if weights is not None:
            corner.mul_(weights[0])
            for values, weight in zip(table[1:], weights[1:], strict=True):
                corner.addcmul_(values[offset:].index_select(0, base), weight)
        return corner

    return read


# These three halve the corners along one axis after another, to the end first, so that little memory is in use at once.


def _mean(read: Callable[[int], Tensor], offsets: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """Interpolate between the corners."""
    if not parts:
        return read(offsets[0])
    half = len(offsets) // 2
    low, high = _mean(read, offsets[:half], parts[1:]), _mean(read, offsets[half:], parts[1:])
    return low.lerp_(high, parts[0])


def _slopes(read: Callable[[int], Tensor], offsets: Sequence[int], parts: Sequence[Tensor]) -> list[Tensor]:
    """:func:`_mean`, then its derivative in each of the parts."""
    if not parts:
        return [read(offsets[0])]
    half = len(offsets) // 2
    low, high = _slopes(read, offsets[:half], parts[1:]), _slopes(read, offsets[half:], parts[1:])
    slope = high[0] - low[0]
    mean, *others = [start.lerp_(end, parts[0]) for start, end in zip(low, high, strict=True)]
    return [mean, slope, *others]


def _spread(share: Tensor, total: Tensor, index: Tensor, offsets: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Add to the corners in total (widened voxels,), by their weights: the reverse of :func:`_mean`."""
    if not parts:
        total[offsets[0] :].scatter_add_(0, index, share)
        return
    half = len(offsets) // 2
    part = share * parts[0]
    _spread(part, total, index, offsets[half:], parts[1:])
    _spread(torch.sub(share, part, out=part), total, index, offsets[:half], parts[1:])
