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
"""Products of every voxel's features with those of its neighbours: the arithmetic of correlation and attention.

The offsets of a neighbourhood of radius r are those of a cube of side ``2r + 1``, the first axis slowest. Work goes by
slabs of the first axis, so that what is between input and output stays small (and, on a CPU, in the cache). Within a
slab the two maps are laid out with equal strides: then every offset is one number in memory, and all windows of a map
are views of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["correlate", "correlate_backward", "correlate_plainly", "neighbour_offsets", "row_slabs", "window"]

# Bytes a slab may take in all: about a CPU's second-level cache; few launches on another device.
_CPU_SLAB, _DEVICE_SLAB = 2**21, 2**26


def neighbour_offsets(radius: int, spatial_dims: int, *, device: torch.device | str | None = None) -> Tensor:
    """The offsets of a neighbourhood in the order of its channels: ((2r+1)^d, d), int64."""
    steps = torch.arange(-radius, radius + 1, device=device)
    return torch.cartesian_prod(*[steps] * spatial_dims)


def row_slabs(a: Tensor, radius: int) -> Iterator[tuple[int, int]]:
    """First and last (excluded) row of the slabs that a map (B, C, *S) is worked through in."""
    dims, rows = a.ndim - 2, a.shape[2]
    channels = 2 * a.shape[1] + (2 * radius + 1) ** dims
    plane = 4 * a.shape[0] * channels * a.shape[3:].numel()
    step = max(1, (_CPU_SLAB if a.device.type == "cpu" else _DEVICE_SLAB) // plane)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def correlate(a: Tensor, halo: Tensor, radius: int) -> Tensor:
    """``out[n](p) = sum_c a_c(p) * halo_c(p + o_n + r)`` for every offset ``o_n``. Not to be differentiated.

    Args:
        a: (B, C, *S).
        halo: (B, C, *S + 2r): the other map, with the neighbours of its outermost voxels.
        radius: r.

    Returns:
        (B, (2r+1)^d, *S), a view.
    """
    dims = a.ndim - 2
    halo = halo.contiguous()
    first, length = _flat(a, radius)
    cube, ones = (2 * radius + 1,) * dims, (1,) * dims
    windows = halo.as_strided((*halo.shape[:2], *cube, length), (*halo.stride(), 1))
    flat = a.new_zeros(len(a), *cube, halo.shape[3:].numel() * a.shape[2])
    total = flat[..., :length]
    for channel in range(a.shape[1]):
        total.addcmul_(first[:, channel].view(len(a), *ones, length), windows[:, channel])
    return _crop(flat.view(len(a), -1, a.shape[2], *halo.shape[3:]), a.shape[2:])


def correlate_plainly(a: Tensor, halo: Tensor, radius: int) -> Tensor:
    """:func:`correlate` of whole maps in plain operations, for networks that are exported."""
    offsets = itertools.product(range(-radius, radius + 1), repeat=a.ndim - 2)
    return torch.stack([(a * window(halo, offset, radius)).sum(1) for offset in offsets], dim=1)


def window(halo: Tensor, offset: Sequence[int], radius: int) -> Tensor:
    """The voxels at an offset from those of a map, out of the map with its halo (..., *S + 2r): (..., *S)."""
    first = halo.ndim - len(offset)
    for axis, step in enumerate(offset, start=first):
        halo = halo.narrow(axis, radius + step, halo.shape[axis] - 2 * radius)
    return halo


def correlate_backward(gradient: Tensor, a: Tensor, halo: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`correlate` in both maps, the first a view."""
    halo = halo.contiguous()
    first, length = _flat(a, radius)
    given, _ = _flat(gradient, radius)
    second = halo.flatten(2)
    for_a = a.new_zeros(*a.shape[:3], *halo.shape[3:])
    for_halo = torch.zeros_like(halo)
    flat_a, flat_halo = for_a.flatten(2)[..., :length], for_halo.flatten(2)
    for n, start in enumerate(_starts(halo, radius)):
        one = given[:, n : n + 1]
        flat_a.addcmul_(one, second.narrow(2, start, length))
        flat_halo.narrow(2, start, length).addcmul_(one, first)
    return _crop(for_a, a.shape[2:]), for_halo


def _flat(a: Tensor, radius: int) -> tuple[Tensor, int]:
    """A map with rows as long as the halo's, in one axis up to its last voxel: (B, C, length), and the length."""
    wide = F.pad(a, [0, 2 * radius] * (a.ndim - 3))
    # The last voxel with its farthest neighbour is the end of the halo.
    strides = [wide.shape[3 + axis :].numel() for axis in range(1, a.ndim - 2)]
    length = wide.shape[2:].numel() - 2 * radius * sum(strides)
    return wide.flatten(2)[..., :length], length


def _starts(halo: Tensor, radius: int) -> list[int]:
    """Where the window of each offset begins in the flattened halo."""
    offsets = neighbour_offsets(radius, halo.ndim - 2) + radius
    starts: list[int] = (offsets * torch.tensor(halo.stride()[2:])).sum(1).tolist()
    return starts


def _crop(wide: Tensor, size: Sequence[int]) -> Tensor:
    for axis, count in enumerate(size, start=2):
        wide = wide.narrow(axis, 0, count)
    return wide
