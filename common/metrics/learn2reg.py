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
"""How Learn2Reg's organisers warp a label map."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.overlap import check_label_maps

__all__ = ["learn2reg_labels"]


def learn2reg_labels(labels: Tensor, ddf: Tensor) -> Tensor:
    """Pull a label map back as Learn2Reg's evaluation does: the nearest voxel, and 0 outside of the moving grid.

    The same as ``scipy.ndimage.map_coordinates(order=0)`` with its constant border: a position half way between two
    voxels takes the upper one, and one beyond the first or last voxel's *centre*, by however little, is outside.
    :func:`common.spatial.warp_labels` moves boundaries with less than a voxel's error, and is what we measure by.

    Args:
        labels: (B, 1, \\*S), an integer dtype.
        ddf: (B, d, \\*S), voxels.

    Returns:
        (B, 1, \\*S) of the dtype of ``labels``.

    Raises:
        ValueError: when a shape is wrong or the two disagree.
    """
    check_label_maps(labels=labels)
    if ddf.shape[0] != labels.shape[0] or ddf.shape[1] != ddf.ndim - 2 or ddf.shape[2:] != labels.shape[2:]:
        raise ValueError(f"ddf must be (B, d, *S) on the grid of labels {tuple(labels.shape)}, got {tuple(ddf.shape)}")
    index = torch.zeros((), dtype=torch.int64, device=ddf.device)
    inside = torch.ones((), dtype=torch.bool, device=ddf.device)
    for axis, size in enumerate(labels.shape[2:]):
        steps = torch.arange(size, device=ddf.device, dtype=torch.float64)
        position = ddf[:, axis].double() + steps.view([-1 if k == axis else 1 for k in range(ddf.shape[1])])
        inside = inside & (position >= 0) & (position <= size - 1)
        index = index * size + (position + 0.5).floor().nan_to_num(0.0).clamp_(0, size - 1).long()
    moved = labels.flatten(1).gather(1, index.flatten(1)).masked_fill(~inside.flatten(1), 0)
    return moved.view(labels.shape)
