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
"""Move label maps without moving one map a label."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from common.spatial.grid import as_field, check_batch, plain
from common.spatial.sampling import padding_code

__all__ = ["warp_labels"]

# Voxels handled at a time: what they need should stay in the cache of a CPU; a GPU wants more to do.
_CHUNK_CPU = 2**17
_CHUNK_ELSEWHERE = 2**22
# Unsigned integers that PyTorch can hold but hardly compute with.
_WIDENED = (torch.uint16, torch.uint32, torch.uint64)


def warp_labels(labels: Tensor, ddf: Tensor, *, padding: str = "border") -> Tensor:
    """Pull a label map back along a field: the label with the greatest linearly interpolated share.

    The same as warping a one-hot map linearly and taking the argmax, but each voxel only asks the 2**d corners around
    its position, so that neither time nor memory depends on the number of labels. Of equal shares the lowest label
    wins. Any integers do, negative ones included.

    Args:
        labels: (B, 1, *Sm), an integer dtype.
        ddf: (B, d, *Sf), voxels.
        padding: ``"border"`` repeats the outermost voxels, ``"zeros"`` has label 0 outside.

    Returns:
        (B, 1, *Sf) of the dtype of ``labels``. It has no gradient.

    Raises:
        ValueError: when the shapes disagree (both are named) or the labels are not integers.
    """
    labels, ddf = plain(labels), as_field(ddf).detach()
    check_batch(labels, ddf, "labels")
    if labels.shape[1] != 1:
        raise ValueError(f"labels must be (B, 1, *S), got {tuple(labels.shape)} for ddf {tuple(ddf.shape)}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise ValueError(f"labels must have an integer dtype, got {labels.dtype}: round them first")
    source = labels.long() if labels.dtype in _WIDENED else labels
    rim = 1 - padding_code(padding)  # a rim of zeros, beyond which positions are held
    if rim:
        source = torch.nn.functional.pad(source, (rim, rim) * ddf.shape[1])
    moved = torch.empty((ddf.shape[0], 1, *ddf.shape[2:]), dtype=source.dtype, device=labels.device)
    chunk = _CHUNK_CPU if ddf.device.type == "cpu" else _CHUNK_ELSEWHERE
    rows = max(1, chunk // max(1, ddf[0, 0, :1].numel()))
    for item, start in itertools.product(range(len(ddf)), range(0, ddf.shape[2], rows)):
        index, parts = _corners(ddf[item, :, start : start + rows], (start, 0, 0), source.shape[2:], rim)
        values = source[item].reshape(-1)[index]
        moved[item, 0, start : start + rows] = _vote(values, parts).view(-1, *ddf.shape[3:])
    return moved.to(labels.dtype)


def _corners(ddf: Tensor, origin: tuple[int, ...], size: torch.Size, rim: int) -> tuple[Tensor, Tensor]:
    """The 2**d voxels around ``x + ddf(x)``.

    Args:
        ddf: (d, *S), a part of the field.
        origin: its first voxel.
        size: of the map to look in, rim included.
        rim: voxels added before the map's first.

    Returns:
        flat indices (2**d, n), and how far the positions are from the lowest corner (d, n).
    """
    dims = len(size)
    index, parts = [torch.zeros((), dtype=torch.int64, device=ddf.device)], []
    for axis in range(dims):
        first = origin[axis] + rim
        steps = torch.arange(first, first + ddf.shape[1 + axis], device=ddf.device, dtype=ddf.dtype)
        position = (ddf[axis] + steps.view([-1 if k == axis else 1 for k in range(dims)])).flatten()
        position = position.clamp_(0, size[axis] - 1).nan_to_num_(0.0)
        low = position.floor()
        parts.append(position - low)
        low_index = low.long()
        high_index = (low_index + 1).clamp_(max=size[axis] - 1)
        index = [before * size[axis] + here for before in index for here in (low_index, high_index)]
    return torch.stack(index), torch.stack(parts)


def _vote(values: Tensor, parts: Tensor) -> Tensor:
    """The label of the greatest share: values (2**d, n) at the corners, position between them (d, n)."""
    winner = values[0].clone()
    # Inside a structure all corners agree, and there is nothing to count.
    mixed = (values[1:] != values[0]).any(0).nonzero().squeeze(1)
    values, parts = values[:, mixed].long(), parts[:, mixed]
    weights = parts.new_ones(1, len(mixed))
    for part in parts:
        weights = torch.stack([weights * (1 - part), weights * part], 1).flatten(0, 1)
    # Equal labels get bitwise equal votes, as each sum runs over the same corners in the same order.
    votes = torch.stack([(weights * (values == value)).sum(0) for value in values])
    highest = torch.iinfo(torch.int64).max
    winner[mixed] = torch.where(votes == votes.amax(0), values, highest).amin(0).to(winner.dtype)
    return winner
