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
"""Move images and points by a displacement field."""

from __future__ import annotations

import torch
from torch import Tensor

from common.spatial.grid import as_field, check_batch, identity_grid, plain
from common.spatial.sampling import padding_code, sample_linear

__all__ = ["warp", "warp_points"]


def warp(image: Tensor, ddf: Tensor, *, mode: str = "linear", padding: str = "border") -> Tensor:
    """Pull an image back along a field: ``moved(x) = image(x + ddf(x))``.

    A field that is +1 along an axis therefore moves the content one voxel towards lower indices.
    Positions and weights are float32 whatever the image's precision and under autocast (float64 if image or field is);
    the result has the image's dtype. The image's grid may have another size than the field's: positions are voxel
    coordinates, which both grids share at their first voxel.

    Args:
        image: (B, C, *Sm); integer images are allowed, and become float32 in linear mode.
        ddf: (B, d, *Sf), voxels, channel k along array axis k.
        mode: ``"linear"`` or ``"nearest"`` (keeps integer dtypes and their exact values; no gradient in the field).
        padding: ``"border"`` repeats the outermost voxels, ``"zeros"`` is zero outside.

    Returns:
        the moved image (B, C, *Sf).

    Raises:
        ValueError: when shapes disagree (both are named), or mode or padding is unknown.
    """
    ddf, image = as_field(ddf), plain(image)
    check_batch(image, ddf)
    if mode == "nearest":
        return _warp_nearest(image, ddf, padding)
    if mode != "linear":
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    dtype = torch.promote_types(ddf.dtype, image.dtype)
    moved = sample_linear(image.to(dtype), ddf.to(dtype), padding)
    return moved.to(image.dtype) if image.dtype.is_floating_point else moved


def warp_points(points: Tensor, ddf: Tensor) -> Tensor:
    """Where points of the fixed grid land in the moving image: ``p + ddf(p)``, the field taken linearly.

    Args:
        points: (B, N, d) voxel coordinates on the fixed grid. Outside of it the field of the nearest border holds.
        ddf: (B, d, *S), voxels.

    Returns:
        (B, N, d) voxel coordinates on the moving grid, float32 (float64 if either input is).

    Raises:
        ValueError: when the shapes disagree; it names both.
    """
    ddf, points = as_field(ddf), plain(points)
    batch, dims = ddf.shape[:2]
    if points.dim() != 3 or points.shape[0] != batch or points.shape[2] != dims:
        raise ValueError(
            f"points must be (B, N, d) for ddf (B, d, *S), got {tuple(points.shape)} and {tuple(ddf.shape)}"
        )
    dtype = torch.promote_types(ddf.dtype, points.dtype)
    points, ddf = points.to(dtype), ddf.to(dtype)
    # The points are the "displacements" of a one-row grid, whose own positions are subtracted.
    count = points.shape[1]
    row = (count,) + (1,) * (dims - 1)
    positions = points.transpose(1, 2).reshape(batch, dims, *row)
    moved = sample_linear(ddf, positions - identity_grid(row, device=ddf.device, dtype=dtype), "border")
    return points + moved.reshape(batch, dims, count).transpose(1, 2)


def nearest_index(ddf: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """The voxel nearest to ``x + ddf(x)``, ties to even.

    Args:
        ddf: (B, d, *Sf).
        size: of the grid to look up in.

    Returns:
        flat indices (B, prod(Sf)) after clamping into the grid, and whether they were inside (same shape, bool).
    """
    index = torch.zeros((), dtype=torch.int64, device=ddf.device)
    inside = torch.ones((), dtype=torch.bool, device=ddf.device)
    dims = ddf.shape[1]
    for axis in range(dims):
        steps = torch.arange(ddf.shape[2 + axis], device=ddf.device, dtype=ddf.dtype)
        position = (ddf[:, axis] + steps.view([-1 if k == axis else 1 for k in range(dims)])).round()
        nearest = position.clamp(0, size[axis] - 1)
        inside = inside & (nearest == position)
        index = index * size[axis] + nearest.long()
    return index.flatten(1), inside.flatten(1)


def _warp_nearest(image: Tensor, ddf: Tensor, padding: str) -> Tensor:
    """Look the nearest voxels up, without arithmetic on the values."""
    zeros = padding_code(padding) == 0
    index, inside = nearest_index(ddf.detach(), image.shape[2:])
    channels = image.shape[1]
    moved = image.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1))
    if zeros:
        moved = moved.masked_fill(~inside.unsqueeze(1), 0)
    return moved.view(image.shape[0], channels, *ddf.shape[2:])
