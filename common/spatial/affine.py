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
"""Affine maps and fields."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial.grid import as_field, identity_grid, plain

__all__ = ["affine_to_ddf", "ddf_to_affine"]


def affine_to_ddf(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The field of an affine map: ``ddf(x) = A x + t - x``.

    Args:
        matrix: (B, d+1, d+1) or (d+1, d+1), homogeneous, from voxel coordinates of the fixed grid to the moving grid's.
        shape: of the fixed grid.

    Returns:
        (B, d, *shape), float32 (float64 if the matrix is).

    Raises:
        ValueError: when the matrix does not fit the shape; both are named.
    """
    matrix = plain(matrix)
    dims = len(shape)
    if matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    if matrix.dim() != 3 or tuple(matrix.shape[1:]) != (dims + 1, dims + 1):
        raise ValueError(f"matrix must be (B, d+1, d+1) for shape {tuple(shape)}, got {tuple(matrix.shape)}")
    matrix = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    grid = identity_grid(shape, device=matrix.device, dtype=matrix.dtype)
    with torch.autocast(matrix.device.type, enabled=False):
        # (A - 1) x, rather than A x - x, which would lose digits.
        change = matrix[:, :dims, :dims] - torch.eye(dims, device=matrix.device, dtype=matrix.dtype)
        linear = change @ grid.flatten(1)
    return (linear + matrix[:, :dims, dims:]).view(-1, dims, *shape)


def ddf_to_affine(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    """The affine map that a field is nearest to, in the least-squares sense over voxels.

    Args:
        ddf: (B, d, *S), voxels.
        mask: (B, 1, *S) or (B, *S): weight of every voxel, not negative; ``None`` weighs all alike.

    Returns:
        (B, d+1, d+1), voxel coordinates of the fixed grid to the moving grid's, in the dtype of ``ddf``.

    Raises:
        ValueError: when the mask does not fit; both shapes are named.
    """
    ddf = as_field(ddf)
    batch, dims = ddf.shape[:2]
    values = ddf.flatten(2).double()
    points = identity_grid(ddf.shape[2:], device=ddf.device, dtype=torch.float64).flatten(1)
    weights = torch.ones_like(values[:, 0])
    if mask is not None:
        weights = plain(mask).reshape(batch, -1).double()
        if weights.shape != values[:, 0].shape:
            raise ValueError(f"mask must be (B, 1, *S), got {tuple(mask.shape)} for ddf {tuple(ddf.shape)}")
    # Centred, so that the normal equations are well conditioned far from the origin.
    total = weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    centre = (weights @ points.T / total).unsqueeze(2)
    mean = (values * weights.unsqueeze(1)).sum(2, keepdim=True) / total.unsqueeze(2)
    offsets = points - centre
    weighted = offsets * weights.unsqueeze(1)
    # The pseudo-inverse copes with axes of one voxel, along which there is nothing to fit.
    slope = ((values - mean) @ weighted.transpose(1, 2)) @ torch.linalg.pinv(weighted @ offsets.transpose(1, 2))
    matrix = torch.eye(dims + 1, dtype=torch.float64, device=ddf.device).repeat(batch, 1, 1)
    matrix[:, :dims, :dims] += slope
    matrix[:, :dims, dims:] = mean - slope @ centre
    return matrix.to(ddf.dtype)
