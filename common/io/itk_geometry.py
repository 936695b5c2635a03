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
"""From RAS to the LPS millimetres of ITK and back: matrices, grids and vectors.

ITK's arrays have their first axis last, and vectors innermost: (z, y, x, d).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.spatial.transform import Affine, Displacement, Grid

__all__ = ["TransformError", "from_lps_affine", "from_lps_field", "itk_geometry", "lps", "lps_matrix", "lps_vectors"]


class TransformError(ValueError):
    """A file that holds no transform we know, or one of another kind than is needed; the message names it."""


def lps(dims: int) -> np.ndarray:
    """RAS to LPS and back, homogeneous; in 2-D both axes are flipped."""
    return np.diag([-1.0, -1.0, 1.0, 1.0] if dims == 3 else [-1.0, -1.0, 1.0])


def lps_matrix(matrix: Tensor) -> np.ndarray:
    """(d+1, d+1) float64: a map of RAS mm as a map of LPS mm."""
    flip = lps(len(matrix) - 1)
    return np.asarray(flip @ matrix.numpy() @ flip)


def from_lps_affine(matrix: np.ndarray) -> Affine:
    """The reverse of :func:`lps_matrix`."""
    flip = lps(len(matrix) - 1)
    return Affine(torch.from_numpy(flip @ matrix @ flip))


def lps_vectors(part: Displacement) -> np.ndarray:
    """(z, y, x, d) float32, LPS mm."""
    dims = len(part.grid.shape)
    field = part.field.detach().cpu().float().numpy() * _signs(dims)
    return np.ascontiguousarray(field.transpose(*range(dims, 0, -1), 0))


def from_lps_field(vectors: np.ndarray, origin: np.ndarray, spacing: np.ndarray, direction: np.ndarray) -> Displacement:
    """The reverse of :func:`lps_vectors`, (z, y, x, d) on a grid as :func:`itk_geometry` has it."""
    dims = vectors.shape[-1]
    affine = np.eye(dims + 1)
    affine[:-1, :-1] = direction * spacing
    affine[:-1, -1] = origin
    array = np.moveaxis(vectors, -1, 0)
    field = np.ascontiguousarray(array.transpose(0, *range(dims, 0, -1)), dtype=np.float32) * _signs(dims)
    return Displacement(torch.from_numpy(field), Grid(field.shape[1:], torch.from_numpy(lps(dims) @ affine)))


def itk_geometry(grid: Grid, path: Path | None = None) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
    """Size, origin, spacing and direction of a grid, in LPS.

    Args:
        grid: the grid.
        path: of the file that is written, for which the grid must not be sheared.

    Raises:
        TransformError: for a sheared grid.
    """
    dims = len(grid.shape)
    affine = lps(dims) @ grid.affine.numpy()
    spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
    direction = affine[:-1, :-1] / spacing
    if path is not None and not np.allclose(direction.T @ direction, np.eye(dims), atol=1e-4):
        raise TransformError(f"{path}: the field's grid is sheared, which ITK cannot represent: {direction.tolist()}")
    return list(grid.shape), affine[:-1, -1], spacing, direction


def _signs(dims: int) -> np.ndarray:
    return np.diag(lps(dims))[:dims].reshape(dims, *[1] * dims).astype(np.float32)
