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
"""A pair of scans and what belongs to it on a coarser grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, pad

__all__ = ["coarser_field", "coarser_values"]


def coarser_field(ddf: Tensor, voxels: Sequence[int]) -> Tensor:
    """A field (B, d, *S) averaged over blocks of so many voxels along each axis, in voxels of their grid."""
    return _pooled(ddf, voxels) / ddf.new_tensor(voxels).view(1, -1, *(1,) * len(voxels))


def coarser_values(values: Mapping[str, Any], voxels: Sequence[int]) -> dict[str, Any]:
    """Average images over blocks of so many voxels along each axis.

    An incomplete last block is filled up with the border. What a mask leaves of a block is what counts of it: hidden
    intensities must not be smeared over the mask's border. Affines are those of the blocks.

    Args:
        values: images and maps (B, C, *S); ``moving_mask`` and ``fixed_mask``, in [0, 1], hide what they are 0 in of
            ``moving`` and ``fixed``; ``moving_affine`` and ``fixed_affine`` (B, d+1, d+1). All else stays as it is.
        voxels: of each block.
    """
    found = {}
    for name, value in values.items():
        mask = values.get(f"{name}_mask")
        if name.endswith("_affine"):
            found[name] = _of_blocks(value, voxels)
        elif not isinstance(value, Tensor) or value.dim() != len(voxels) + 2:
            found[name] = value
        elif mask is None:
            found[name] = _pooled(value, voxels)
        else:
            share, seen = _pooled(mask, voxels), _pooled(torch.where(mask > 0, value, 0.0) * mask, voxels)
            found[name] = torch.where(share > 0, seen / share, _pooled(value, voxels))
    return found


def _of_blocks(affine: Tensor, voxels: Sequence[int]) -> Tensor:
    """The affine (B, d+1, d+1) from places in blocks to the world, for one from places in voxels.

    That of a stack of slices has one axis more.
    """
    voxels = [*voxels, *[1] * (affine.shape[-1] - 1 - len(voxels))]
    blocks = torch.diag(affine.new_tensor([*voxels, 1]))
    blocks[:-1, -1] = (affine.new_tensor(voxels) - 1) / 2
    return affine @ blocks


def _pooled(image: Tensor, voxels: Sequence[int]) -> Tensor:
    """Averages over blocks."""
    short = [-n % f for n, f in zip(image.shape[2:], voxels, strict=True)]
    if any(short):
        image = pad(image, [n for s in reversed(short) for n in (0, s)], mode="replicate")
    return (avg_pool2d if image.dim() == 4 else avg_pool3d)(image, tuple(voxels))
