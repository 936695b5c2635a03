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

import torch
from torch import Tensor

from common.spatial.grid import as_field, check_batch, plain
from common.spatial.sampling import padding_code

__all__ = ["warp_labels"]


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
    code = padding_code(padding)
    moved = torch.empty((ddf.shape[0], 1, *ddf.shape[2:]), dtype=labels.dtype, device=labels.device)
    for item in range(ddf.shape[0]):
        moved[item, 0] = _vote(labels[item, 0], ddf[item], zeros=code == 0)
    return moved


def _vote(labels: Tensor, ddf: Tensor, zeros: bool) -> Tensor:
    """The winning label at every voxel, for one item: labels (*Sm), ddf (d, *Sf)."""
    values, weights = _corners(labels, ddf, zeros)
    winner = values[0]
    most = torch.full_like(weights[0], -1.0)
    for value in values:
        votes = torch.zeros_like(most)
        for other, weight in zip(values, weights, strict=True):
            votes += weight * (other == value)
        better = (votes > most) | ((votes == most) & (value < winner))
        winner, most = torch.where(better, value, winner), torch.where(better, votes, most)
    return winner


def _corners(labels: Tensor, ddf: Tensor, zeros: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Labels and weights of the 2**d voxels around ``x + ddf(x)``."""
    dims = ddf.shape[0]
    flat = labels.reshape(-1)
    corners = [(torch.zeros((), dtype=torch.int64, device=ddf.device), ddf.new_ones(()), None)]
    for axis in range(dims):
        size = labels.shape[axis]
        steps = torch.arange(ddf.shape[1 + axis], device=ddf.device, dtype=ddf.dtype)
        position = ddf[axis] + steps.view([-1 if k == axis else 1 for k in range(dims)])
        position = position.clamp(-1, size) if zeros else position.clamp(0, size - 1)
        low = position.floor()
        part = position - low
        grown = []
        for index, weight, outside in corners:
            for step, share in ((0, 1 - part), (1, part)):
                place = low.long() + step
                held = place.clamp(0, size - 1)
                out = (held != place) if outside is None else outside | (held != place)
                grown.append((index * size + held, weight * share, out))
        corners = grown
    values = [flat[index] for index, _, _ in corners]
    if zeros:
        values = [value.masked_fill(out, 0) for value, (_, _, out) in zip(values, corners, strict=True)]
    return values, [weight for _, weight, _ in corners]
