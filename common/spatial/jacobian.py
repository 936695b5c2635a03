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
"""Jacobians of the map ``x + ddf(x)`` by central differences."""

from __future__ import annotations

import torch
from torch import Tensor

from common.spatial.grid import as_field

__all__ = ["jacobian_determinant", "jacobian_matrix"]


def jacobian_matrix(ddf: Tensor) -> Tensor:
    """Derivatives of ``phi(x) = x + ddf(x)``: entry ``[:, i, j]`` is that of component i along axis j.

    Central differences, ``(phi(x+1) - phi(x-1)) / 2``; one-sided at the border, 0 change along axes of size 1. Where
    only central differences count, crop one voxel on every side.

    Args:
        ddf: (B, d, *S), voxels.

    Returns:
        (B, d, d, *S), float32.
    """
    ddf = as_field(ddf)
    dims = ddf.shape[1]
    columns = [_difference(ddf, 2 + axis) for axis in range(dims)]
    matrix = torch.stack(columns, dim=2)
    identity = torch.eye(dims, device=ddf.device, dtype=ddf.dtype).view(1, dims, dims, *(1,) * dims)
    return matrix + identity


def jacobian_determinant(ddf: Tensor) -> Tensor:
    """Determinant of :func:`jacobian_matrix`: the local change of volume; where it is not positive, the map folds.

    Args:
        ddf: (B, d, *S), voxels.

    Returns:
        (B, *S), float32.
    """
    return determinant(list(jacobian_matrix(ddf).unbind(2)))


def determinant(columns: list[Tensor]) -> Tensor:
    """Determinant of the 2x2 or 3x3 matrices with these columns, each (B, d, *S).

    Written out, since LAPACK is slow on many tiny matrices.
    """
    if len(columns) == 2:
        (a, b), (c, d) = (column.unbind(1) for column in columns)
        return a * d - b * c
    (a, b, c), (d, e, f), (g, h, i) = (column.unbind(1) for column in columns)
    return a * (e * i - f * h) - d * (b * i - c * h) + g * (b * f - c * e)


def _difference(field: Tensor, dim: int) -> Tensor:
    """Central difference along ``dim``, one-sided at both ends, zero on an axis of size 1."""
    size = field.shape[dim]
    if size == 1:
        return torch.zeros_like(field)
    steps = field.narrow(dim, 1, size - 1) - field.narrow(dim, 0, size - 1)
    middle = (steps.narrow(dim, 1, size - 2) + steps.narrow(dim, 0, size - 2)) / 2
    return torch.cat([steps.narrow(dim, 0, 1), middle, steps.narrow(dim, size - 2, 1)], dim)
