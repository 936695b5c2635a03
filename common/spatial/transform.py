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
"""Maps between the physical spaces of two images, as chains of affine maps and displacement fields.

Everything here is in RAS mm and pulls back: a transform takes a point of the fixed image to its partner in the moving
image, ``moved(x) = moving(T(x))``. However many parts a chain has, an image goes through its total field once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.spatial.affine import affine_to_ddf
from common.spatial.grid import as_field
from common.spatial.inversion import invert
from common.spatial.warping import warp, warp_points

__all__ = ["Affine", "Displacement", "Grid", "SpatialTransform"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an image lie.

    Attributes:
        shape: voxels along each of the d axes.
        affine: (d+1, d+1) float64 from voxel indices to RAS mm.

    Raises:
        ValueError: when the two do not fit, or the affine is singular.
    """

    shape: tuple[int, ...]
    affine: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "affine", _matrix(self.affine, len(self.shape)))


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> matrix x``.

    Attributes:
        matrix: (d+1, d+1) float64, homogeneous, RAS mm.

    Raises:
        ValueError: for another shape, or a singular matrix.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", _matrix(self.matrix, len(self.matrix) - 1))

    def points(self, points: Tensor) -> Tensor:
        """Where points (N, d) float64 go."""
        matrix = self.matrix.to(points.device)
        return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


@dataclass(frozen=True, eq=False)
class Displacement:
    """``x -> x + field(x)``, linear between voxels; beyond the grid the field of the nearest border holds.

    Attributes:
        field: (d, *S) float32, RAS mm.
        grid: where its voxels lie.

    Raises:
        ValueError: when the field does not fit the grid.
    """

    field: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        expected = (len(self.grid.shape), *self.grid.shape)
        if tuple(self.field.shape) != expected:
            raise ValueError(f"the field of a grid of {self.grid.shape} is {expected}, got {tuple(self.field.shape)}")

    @property
    def ddf(self) -> Tensor:
        """(1, d, *S) the same displacements in voxels of the grid."""
        return _rotate(torch.linalg.inv(self.grid.affine), self.field)[None]


@dataclass(frozen=True, eq=False)
class SpatialTransform:
    """A chain of maps from the fixed to the moving image's space.

    Attributes:
        parts: in the order in which they act on a point of the fixed image. A registration that starts from an affine
            alignment is a displacement, on the fixed grid, and then the affine map, as in ITK and ANTs.

    Raises:
        ValueError: when parts differ in dimension, or there are none.
    """

    parts: tuple[Affine | Displacement, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        dims = {_dims(part) for part in self.parts}
        if len(dims) != 1:
            raise ValueError(f"a transform has parts of one dimension, got {[_dims(part) for part in self.parts]}")

    @staticmethod
    def from_ddf(ddf: Tensor, fixed: Grid, moving: Grid, matrix: Tensor | None = None) -> SpatialTransform:
        """The transform of a field in voxels.

        Args:
            ddf: (1, d, *S) from voxels of ``fixed`` to voxels of ``moving``: all of the motion.
            fixed: its grid.
            moving: the grid of the moving image.
            matrix: (d+1, d+1) an affine map, RAS mm, to be kept as a part of its own; the field is what remains.

        Returns:
            the displacement and, where one is given, the affine map.
        """
        ddf = as_field(ddf)
        after = (
            torch.eye(len(fixed.shape) + 1, dtype=torch.float64) if matrix is None else _matrix(matrix, ddf.shape[1])
        )
        to_fixed_space = torch.linalg.solve(after, moving.affine)
        # B (i + u) - A i = (B - A) i + B u: large coordinates are never subtracted in single precision.
        rest = _linear_field(to_fixed_space - fixed.affine, fixed.shape).to(ddf.device)
        part = Displacement(rest + _rotate(to_fixed_space, ddf[0]), fixed)
        return SpatialTransform((part,) if matrix is None else (part, Affine(after)))

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return _dims(self.parts[0])

    @property
    def matrix(self) -> Tensor | None:
        """The whole as one affine map, if it is one."""
        if any(isinstance(part, Displacement) for part in self.parts):
            return None
        total = torch.eye(self.spatial_dims + 1, dtype=torch.float64)
        for part in self.parts:
            assert isinstance(part, Affine)
            total = part.matrix @ total
        return total

    def ddf(self, fixed: Grid, moving: Grid) -> Tensor:
        """The total field on any grid of the fixed space, for :func:`common.spatial.warp` of the moving image.

        Args:
            fixed: the grid that the result lies on.
            moving: the grid of the image to warp.

        Returns:
            (1, d, *fixed.shape) float32, from voxels of ``fixed`` to voxels of ``moving``.
        """
        device = next((part.field.device for part in self.parts if isinstance(part, Displacement)), torch.device("cpu"))
        # A voxel i is at ``linear`` i + offset(i), the offset being small and in single precision.
        linear, offset = fixed.affine, torch.zeros(len(fixed.shape), *fixed.shape, device=device)
        for part in self.parts:
            if isinstance(part, Affine):
                linear, offset = part.matrix @ linear, _rotate(part.matrix, offset)
            else:
                to_voxels = torch.linalg.inv(part.grid.affine)
                at = affine_to_ddf((to_voxels @ linear).float(), fixed.shape).to(device) + _rotate(to_voxels, offset)
                offset = offset + warp(part.field[None], at)[0]
        to_voxels = torch.linalg.inv(moving.affine)
        return affine_to_ddf((to_voxels @ linear).float(), fixed.shape).to(device) + _rotate(to_voxels, offset)

    def points(self, points: Tensor) -> Tensor:
        """Where points of the fixed image lie in the moving one.

        Args:
            points: (N, d) RAS mm.

        Returns:
            (N, d) float64, RAS mm.
        """
        points = points.double()
        for part in self.parts:
            if isinstance(part, Affine):
                points = part.points(points)
            else:
                voxels = Affine(torch.linalg.inv(part.grid.affine)).points(points)
                moved = warp_points(voxels[None], part.ddf.double().to(points.device))[0]
                points = Affine(part.grid.affine).points(moved)
        return points

    def inverse(self, tolerance: float = 1e-3) -> tuple[SpatialTransform, float]:
        """From the moving image's space to the fixed one's; affine maps exactly, displacements numerically.

        Args:
            tolerance: voxels; see :func:`common.spatial.invert`.

        Returns:
            the inverse, and how far at most, in mm, going there and back from a voxel ends from where it began.

        Warns:
            UserWarning: when a displacement has no inverse to that tolerance, as where it folds.
        """
        parts: list[Affine | Displacement] = []
        residual = 0.0
        for part in reversed(self.parts):
            if isinstance(part, Affine):
                parts.append(Affine(torch.linalg.inv(part.matrix)))
                continue
            found = invert(part.ddf, tolerance=tolerance)
            voxel = float(torch.linalg.svdvals(part.grid.affine[:-1, :-1]).max())
            residual = max(residual, float(found.residual) * voxel)
            parts.append(Displacement(_rotate(part.grid.affine, found.ddf[0]), part.grid))
        return SpatialTransform(tuple(parts)), residual

    def then(self, other: SpatialTransform) -> SpatialTransform:
        """This transform, then another of the space it leads to."""
        return SpatialTransform((*self.parts, *other.parts))


def _matrix(matrix: Tensor, dims: int) -> Tensor:
    matrix = torch.as_tensor(matrix, dtype=torch.float64).cpu()
    if dims not in (2, 3) or matrix.shape != (dims + 1, dims + 1):
        raise ValueError(f"expected a {dims + 1}x{dims + 1} matrix of 2 or 3 dimensions, got {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()) or abs(float(torch.linalg.det(matrix))) < 1e-12:
        raise ValueError(f"the matrix has no inverse: {matrix.tolist()}")
    return matrix


def _dims(part: Affine | Displacement) -> int:
    return len(part.matrix) - 1 if isinstance(part, Affine) else len(part.grid.shape)


def _rotate(matrix: Tensor, field: Tensor) -> Tensor:
    """The linear part of a matrix on every vector of a field (d, *S)."""
    return torch.tensordot(matrix[:-1, :-1].to(field.device, torch.float32), field.float(), dims=1)


def _linear_field(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """(d, *shape) float32: the matrix applied to every voxel index, computed in double precision axis by axis."""
    dims = len(shape)
    total = matrix[:dims, dims].reshape(dims, *[1] * dims)
    for axis, length in enumerate(shape):
        steps = torch.arange(length, dtype=torch.float64).reshape([-1 if k == axis else 1 for k in range(dims)])
        total = total + matrix[:dims, axis].reshape(dims, *[1] * dims) * steps
    return total.float()
