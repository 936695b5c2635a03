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
"""The same physical motion, expressed on other voxel grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial.affine import affine_to_ddf
from common.spatial.warping import warp

__all__ = ["field_on_grid"]


def field_on_grid(
    ddf: Tensor,
    fixed_affine: Tensor,
    moving_affine: Tensor,
    shape: Sequence[int],
    new_fixed_affine: Tensor,
    new_moving_affine: Tensor,
) -> Tensor:
    """Carry a field from the grids a network worked on to the grids of the user's files.

    A voxel i of the new fixed grid lies at j of the old one; the field sends it to k = j + ddf(j) of the old moving
    grid, which is some voxel of the new moving grid; the new field is that voxel minus i. Orientation flips, padding,
    cropping and resampling of either image are all covered, since only the affines tell the grids apart.

    Args:
        ddf: (1, d, *S) in voxels, on the old fixed grid.
        fixed_affine: (d+1, d+1) voxel to world of the old fixed grid.
        moving_affine: the same of the old moving grid.
        shape: size of the new fixed grid.
        new_fixed_affine: voxel to world of the new fixed grid.
        new_moving_affine: voxel to world of the new moving grid.

    Returns:
        (1, d, *shape) float32, from voxels of the new fixed grid to voxels of the new moving grid. Where the new grid
        reaches beyond the old one, the field keeps its border value.

    Raises:
        ValueError: when a matrix does not fit the field's dimension, or the batch is not 1.
    """
    d = ddf.shape[1]
    matrices = [m.to(device=ddf.device, dtype=torch.float64) for m in (fixed_affine, moving_affine)]
    matrices += [m.to(device=ddf.device, dtype=torch.float64) for m in (new_fixed_affine, new_moving_affine)]
    if ddf.shape[0] != 1 or any(m.shape != (d + 1, d + 1) for m in matrices):
        raise ValueError(
            f"expected one field (1, {d}, *S) and {d + 1}x{d + 1} matrices, got {tuple(ddf.shape)} and "
            f"{[tuple(m.shape) for m in matrices]}"
        )
    old_fixed, old_moving, new_fixed, new_moving = matrices
    to_old_fixed = torch.linalg.solve(old_fixed, new_fixed)
    to_new_moving = torch.linalg.solve(new_moving, old_moving)
    displacement = warp(ddf, affine_to_ddf(to_old_fixed.float(), shape).to(ddf.device))
    # In one product, M(j + u) - i = (M J - 1) i + M u, so that large coordinates are never subtracted.
    rest = affine_to_ddf((to_new_moving @ to_old_fixed).float(), shape).to(ddf.device)
    return rest + torch.einsum("ij,bj...->bi...", to_new_moving[:d, :d].float(), displacement)
