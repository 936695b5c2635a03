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
"""Digital diffeomorphism: the volume that a field folds, counted in tetrahedra (triangles in 2-D).

Source: Liu, Chen, Wei, Carass, Prince, On finite difference Jacobian computation in deformable image registration
(IJCV 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial.grid import as_field, plain
from common.spatial.jacobian import determinant

__all__ = ["digital_jacobian_determinants", "non_diffeomorphic_volume", "non_diffeomorphic_volume_percent"]

# Two tetrahedra that no combination of one-sided differences covers: steps to their corners, in order of the columns.
_CENTRAL_STEPS = (((-1, -1, 0), (-1, 0, -1), (0, -1, -1)), ((1, 1, 0), (0, 1, 1), (1, 0, 1)))


def digital_jacobian_determinants(ddf: Tensor) -> Tensor:
    """Signed volumes of the simplices around every inner voxel under ``x + ddf(x)``.

    In 3-D ten: the eight combinations of forward and backward differences (forward first; the last axis varies
    fastest), then two tetrahedra spanned by face diagonals, whose determinant is 2 under the identity where the others'
    is 1. In 2-D the four combinations. A map is digitally diffeomorphic where all are positive.

    Args:
        ddf: (B, d, *S), voxels, at least 3 along every axis.

    Returns:
        (B, 10, *(S - 2)) in 3-D, (B, 4, *(S - 2)) in 2-D: the border voxels have not all neighbours.

    Raises:
        ValueError: when an axis is shorter than 3.
    """
    ddf = as_field(ddf)
    return torch.stack([determinant(columns) for columns in _simplices(ddf)], dim=1)


def non_diffeomorphic_volume(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    """Volume that the field turns inside out, in voxels.

    ``sum over simplices and inner voxels of max(-det, 0) / (2 d!)``: d! because a determinant is that many simplices,
    and 2 because the simplices around all voxels tile space twice.

    Args:
        ddf: (B, d, *S), voxels.
        mask: (B, 1, *S) or (B, *S), where to count (on the fixed grid, as the field is); ``None`` counts everywhere.

    Returns:
        (B,), in the dtype of ``ddf``; differentiable.

    Raises:
        ValueError: when the mask does not fit (both shapes are named) or an axis is shorter than 3.
    """
    ddf = as_field(ddf)
    inner = _inner_mask(ddf, mask)
    total = ddf.new_zeros(ddf.shape[0])
    for columns in _simplices(ddf):
        folded = determinant(columns).neg().clamp_min(0)
        total = total + (folded if inner is None else folded * inner).flatten(1).sum(1)
    return total / (2 * math.factorial(ddf.shape[1]))


def non_diffeomorphic_volume_percent(ddf: Tensor, mask: Tensor | None = None) -> Tensor:
    """:func:`non_diffeomorphic_volume` in percent of the voxels counted (the mask without the outermost voxels).

    Args:
        ddf: (B, d, *S), voxels.
        mask: as there.

    Returns:
        (B,); NaN where the mask is empty. May exceed 100 when folds overlap.
    """
    ddf = as_field(ddf)
    inner = _inner_mask(ddf, mask)
    if inner is None:
        count = ddf.new_full((ddf.shape[0],), math.prod(size - 2 for size in ddf.shape[2:]))
    else:
        count = inner.flatten(1).sum(1)
    return 100 * non_diffeomorphic_volume(ddf, mask) / count


def _simplices(ddf: Tensor) -> list[list[Tensor]]:
    """The columns (B, d, *(S-2)) of every simplex's Jacobian."""
    dims = ddf.shape[1]
    if min(ddf.shape[2:]) < 3:
        raise ValueError(f"digital Jacobians need 3 voxels along every axis, got ddf {tuple(ddf.shape)}")
    forward = [_edge(ddf, _unit(axis, dims, 1)) for axis in range(dims)]
    backward = [-_edge(ddf, _unit(axis, dims, -1)) for axis in range(dims)]
    pairs = zip(forward, backward, strict=True)
    simplices = [list(columns) for columns in itertools.product(*pairs)]
    if dims == 3:
        simplices += [[_edge(ddf, step) for step in steps] for steps in _CENTRAL_STEPS]
    return simplices


def _edge(ddf: Tensor, step: Sequence[int]) -> Tensor:
    """``phi(x + step) - phi(x)`` over the inner voxels: (B, d, *(S-2))."""
    size = ddf.shape[2:]
    ahead = ddf[(..., *(slice(1 + s, n - 1 + s) for s, n in zip(step, size, strict=True)))]
    here = ddf[(..., *(slice(1, n - 1) for n in size))]
    return ahead - here + torch.tensor(step, dtype=ddf.dtype, device=ddf.device).view(1, -1, *(1,) * len(size))


def _unit(axis: int, dims: int, sign: int) -> list[int]:
    """A step of one voxel along an axis."""
    return [sign if k == axis else 0 for k in range(dims)]


def _inner_mask(ddf: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as numbers without its outermost voxels: (B, *(S-2))."""
    if mask is None:
        return None
    size = tuple(ddf.shape[2:])
    if tuple(mask.shape) not in ((ddf.shape[0], 1, *size), (ddf.shape[0], *size)):
        raise ValueError(f"mask must be (B, 1, *S), got {tuple(mask.shape)} for ddf {tuple(ddf.shape)}")
    inside = (plain(mask) > 0).reshape(ddf.shape[0], *size).to(ddf.dtype)
    return inside[(slice(None), *(slice(1, n - 1) for n in size))]
