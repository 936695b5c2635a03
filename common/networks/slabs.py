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
"""Convolutions and residual blocks on maps too large to be held more than once, where no gradient is recorded.

Work goes by slabs of the first axis. A residual block goes over its map three times, and only the result is held whole:
the second convolution overwrites the first one's result behind itself, the skip is computed anew where it is needed,
and the norms collect their statistics from the slabs. A slab is small enough for the allocator to keep its memory for
the next one; larger pieces come from the system every time, which takes a CPU as long as the convolution itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks.convolution import convolve
from common.spatial.exporting import exporting

if TYPE_CHECKING:
    from common.networks.blocks import InstanceNorm
    from common.networks.residual import ResidualBlock

__all__ = ["Reader", "convolve_by_slabs", "convolve_rows", "is_large", "residual_by_slabs"]

#: Gives rows of a map: called with the first and the last (excluded) one, returns them as (B, C, n, ...).
Reader = Callable[[int, int], Tensor]

_CPU_SLAB, _DEVICE_SLAB = 3 * 2**21, 2**26  # numbers in a slab
_EPSILON = 1e-5  # of F.instance_norm


def is_large(x: Tensor, channels: int) -> bool:
    """Whether a map of so many channels on the grid of x (B, C, *S) is worth slabs: no gradient, and more than one."""
    if torch.is_grad_enabled() or exporting():
        return False
    return x[:, :1].numel() * channels > _most(x.device)


def convolve_by_slabs(layer: nn.Module, read: Reader, size: Sequence[int]) -> Tensor:
    """A convolution of stride 1, in the precision of its weights unless under autocast. Not to be differentiated.

    Args:
        layer: the convolution.
        read: gives rows of the map.
        size: of the map, *S.

    Returns:
        (B, out_channels, *S).
    """
    (result,) = _collect(lambda rows: [convolve_rows(layer, rows)], layer, read, size)
    return result


def convolve_rows(layer: nn.Module, rows: Tensor) -> Tensor:
    """A convolution of rows (B, C, n, ...) that bring the neighbours along which the kernel reaches: (B, out, m, ...).

    A kernel of size 1 leaves out the first and the last row.
    """
    reach = layer.weight.shape[-1] // 2
    rows = rows if reach else rows[:, :, 1:-1]
    padding = (0,) + (reach,) * (rows.ndim - 3)
    return convolve(rows.to(layer.weight.dtype), layer.weight, layer.bias, stride=layer.stride[0], padding=padding)


def residual_by_slabs(
    block: ResidualBlock,
    read: Reader,
    size: Sequence[int],
    apply: Callable[[nn.Module, Tensor], list[Tensor]] | None = None,
) -> list[Tensor]:
    """What a residual block makes of a map. Not to be differentiated.

    Args:
        block: the residual block.
        read: gives rows of the map.
        size: of the map, *S.
        apply: how the first convolution and the skip are applied to rows with neighbours, if not as
            :func:`convolve_rows` does it; it may return several results, of which the rest is then made one by one.

    Returns:
        the results, (B, out_channels, *S / stride) each.
    """
    apply = apply or _apply
    skips: list[_Statistics] = []
    norms: list[_Statistics] = []

    def begin(rows: Tensor) -> list[Tensor]:
        parts, others = apply(block.conv1, rows), apply(block.skip, rows)
        for statistics, norm, found in ((norms, block.norm1, parts), (skips, block.skip_norm, others)):
            statistics += [_Statistics(norm, part) for part in found[len(statistics) :]]
            for one, part in zip(statistics, found, strict=True):
                one.add(part)
        return parts

    results = _collect(begin, block.conv1, read, size)
    seconds = [_convolve_in_place(block, result, norm) for result, norm in zip(results, norms, strict=True)]
    scales = [(second.scale_and_shift(), skip.scale_and_shift()) for second, skip in zip(seconds, skips, strict=True)]
    for start, stop, rows in _rows(block.conv1, read, size):
        others = apply(block.skip, rows)
        for result, other, ((scale, shift), (skip_scale, skip_shift)) in zip(results, others, scales, strict=True):
            here = result[:, :, start:stop]
            total = torch.addcmul(shift + skip_shift, here, scale).addcmul_(other, skip_scale)
            here.copy_(F.leaky_relu_(total, block.slope))
    return results


class _Statistics:
    """The statistics of an instance norm, brought up to date with every part of a map.

    Nothing is kept of a part: a small tensor left behind in the memory of a slab would keep the next one from using it.
    """

    def __init__(self, norm: InstanceNorm, like: Tensor) -> None:
        self.norm, self.count = norm, 0
        self.shape = (*like.shape[:2], *(1,) * (like.ndim - 2))
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.mean = torch.zeros(like.shape[:2].numel(), dtype=torch.float64, device=like.device)
        self.variance = torch.zeros_like(self.mean)

    def add(self, part: Tensor) -> None:
        """Count rows (B, C, n, ...) in."""
        # Every channel of every item as a channel of one item: what batch normalisation then does is instance-wise.
        one_item = part.to(self.dtype).reshape(1, -1, *part.shape[2:])
        mean, variance = torch.batch_norm_update_stats(one_item, None, None, 0.0)
        self.count += part.shape[2]
        share = part.shape[2] / self.count
        difference = mean.double().sub_(self.mean)
        self.mean.add_(difference, alpha=share)
        self.variance.lerp_(variance.double(), share).addcmul_(difference, difference, value=share * (1 - share))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Factor and summand that normalise the map, (B, C, 1, ...) each."""
        assert self.norm.weight is not None and self.norm.bias is not None
        scale = self.norm.weight.repeat(self.shape[0]) * (self.variance + _EPSILON).rsqrt()
        shift = self.norm.bias.repeat(self.shape[0]) - self.mean * scale
        return scale.to(self.dtype).view(self.shape), shift.to(self.dtype).view(self.shape)


def _most(device: torch.device) -> int:
    return _CPU_SLAB if device.type == "cpu" else _DEVICE_SLAB


def _slabs(count: int, plane: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """First and last (excluded) of ``count`` rows of ``plane`` numbers each, in slabs of nearly equal height."""
    parts = -(-count // max(1, _most(device) // plane))
    height = -(-count // parts)
    for start in range(0, count, height):
        yield start, min(start + height, count)


def _rows(layer: nn.Module, read: Reader, size: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Slabs of the result of a convolution (first row, last one), each with the rows of the map that it reaches."""
    stride, last_row = layer.stride[0], size[0]
    count, *others = (-(-n // stride) for n in size)
    channels = max(stride ** len(size) * layer.in_channels, layer.out_channels) * len(read(0, 1))
    for start, stop in _slabs(count, channels * torch.Size(others).numel(), layer.weight.device):
        first, last = stride * start - 1, stride * (stop - 1) + 2
        rows = read(max(first, 0), min(last, last_row))
        if first < 0 or last > last_row:
            outside = (max(-first, 0), max(last - last_row, 0))
            rows = F.pad(rows, (0, 0) * (rows.ndim - 3) + outside)
        yield start, stop, rows


def _collect(
    function: Callable[[Tensor], list[Tensor]], layer: nn.Module, read: Reader, size: Sequence[int]
) -> list[Tensor]:
    """Whole maps of what a function makes of rows with neighbours."""
    results: list[Tensor] = []
    count = -(-size[0] // layer.stride[0])
    for start, stop, rows in _rows(layer, read, size):
        parts = function(rows)
        results = results or [part.new_empty((*part.shape[:2], count, *part.shape[3:])) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[:, :, start:stop] = part
    return results


def _apply(layer: nn.Module, rows: Tensor) -> list[Tensor]:
    return [convolve_rows(layer, rows)]


def _convolve_in_place(block: ResidualBlock, x: Tensor, norm: _Statistics) -> _Statistics:
    """Normalise x, activate, convolve; returns the statistics of the result, which x then holds."""
    (scale, shift), statistics, count = norm.scale_and_shift(), _Statistics(block.norm2, x), x.shape[2]
    slabs = list(_slabs(count, x[:, :, :1].numel(), x.device))
    # A row before the slab, as it was before it was overwritten, and one behind.
    rows = x.new_zeros((*x.shape[:2], slabs[0][1] + 2, *x.shape[3:]))
    for start, stop in slabs:
        end = min(stop + 1, count)
        here = rows[:, :, 1 : 1 + end - start]
        F.leaky_relu_(torch.addcmul(shift, x[:, :, start:end], scale, out=here), block.slope)
        rows[:, :, 1 + end - start :] = 0
        part = convolve_rows(block.conv2, rows[:, :, : stop - start + 2])
        statistics.add(part)
        x[:, :, start:stop] = part
        rows[:, :, 0] = rows[:, :, stop - start]
    return statistics
