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
"""Transforms as ITK's own objects: affine maps, displacement fields and composites of them, in LPS mm.

ITK's composites act on a point with the part that was added last first; ours are listed in the order of action.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.spatial.transform import Affine, Displacement, Grid, SpatialTransform

__all__ = ["TransformError", "read_itk_transform", "write_itk_transform"]


class TransformError(ValueError):
    """A file that holds no transform we know, or one of another kind than is needed; the message names it."""


def read_itk_transform(path: Path, fixed: Grid | None = None) -> SpatialTransform:
    """Read what ITK, ANTs, SimpleITK, Slicer or elastix (``-o`` in ITK form) wrote: ``.h5 .tfm .txt .mat .xfm``.

    Args:
        path: the file.
        fixed: the fixed image's grid; a B-spline, which has no grid of voxels, is sampled there.

    Returns:
        the transform; the transforms of a file that holds several act last first, as ITK has it.

    Raises:
        TransformError: for a damaged file, or a kind of transform that is not linear, a field or a B-spline.
    """
    import itk

    try:
        read = list(itk.transformread(str(path)))
    except RuntimeError as error:
        raise TransformError(f"{path} cannot be read as an ITK transform: {str(error).splitlines()[-1]}") from error
    parts = [part for one in reversed(read) for part in _parts(one, path, fixed)]
    if not parts:
        raise TransformError(f"{path} holds no transform")
    return SpatialTransform(tuple(parts))


def _parts(transform: Any, path: Path, fixed: Grid | None) -> list[Affine | Displacement]:
    import itk

    kind = transform.GetTransformTypeAsString()
    dims = transform.GetInputSpaceDimension()
    if kind.startswith("CompositeTransform"):
        members = [itk.down_cast(transform.GetNthTransform(k)) for k in range(transform.GetNumberOfTransforms())]
        return [part for member in reversed(members) for part in _parts(member, path, fixed)]
    if kind.startswith("DisplacementField"):
        return [_from_itk_field(transform.GetDisplacementField())]
    if kind.startswith("IdentityTransform"):
        return [Affine(torch.eye(dims + 1, dtype=torch.float64))]
    if hasattr(transform, "GetOffset"):
        matrix = np.eye(dims + 1)
        if hasattr(transform, "GetMatrix"):
            matrix[:-1, :-1] = itk.array_from_matrix(transform.GetMatrix())
        matrix[:-1, -1] = np.array(transform.GetOffset())
        flip = _lps(dims)
        return [Affine(torch.from_numpy(flip @ matrix @ flip))]
    if kind.startswith("BSpline"):
        if fixed is None:
            raise TransformError(f"{path} holds a {kind}, which needs the fixed image to be sampled on: name it too")
        return [_sampled(transform, fixed)]
    raise TransformError(f"{path} holds a {kind}; linear transforms, displacement fields and B-splines are read")


def _from_itk_field(image: Any) -> Displacement:
    import itk

    dims = image.GetImageDimension()
    direction = itk.array_from_matrix(image.GetDirection())
    affine = np.eye(dims + 1)
    affine[:-1, :-1] = direction * np.array(image.GetSpacing())
    affine[:-1, -1] = np.array(image.GetOrigin())
    array = np.moveaxis(np.array(itk.array_view_from_image(image)), -1, 0)  # (d, z, y, x)
    field = np.ascontiguousarray(array.transpose(0, *range(dims, 0, -1)), dtype=np.float32)
    flip = _lps(dims)
    field *= np.diag(flip)[:dims].reshape(dims, *[1] * dims).astype(np.float32)
    return Displacement(torch.from_numpy(field), Grid(field.shape[1:], torch.from_numpy(flip @ affine)))


def _sampled(transform: Any, grid: Grid) -> Displacement:
    """ITK's own sampling of a transform on a grid."""
    import itk

    dims = len(grid.shape)
    vectors = itk.Image[itk.Vector[itk.F, dims], dims]
    sampler = itk.TransformToDisplacementFieldFilter[vectors, itk.D].New()
    size, origin, spacing, direction = _itk_geometry(grid)
    sampler.SetSize(size)
    sampler.SetOutputOrigin(origin)
    sampler.SetOutputSpacing(spacing)
    sampler.SetOutputDirection(itk.matrix_from_array(direction))
    sampler.SetTransform(transform)
    sampler.Update()
    return _from_itk_field(sampler.GetOutput())


def write_itk_transform(path: Path, transform: SpatialTransform) -> None:
    """Write one transform, or a composite of several.

    An affine map alone is written in double precision. With a field all is in single precision, which is what fields
    are computed in, and a fifth of the time and half of the memory; ITK's readers take either.

    Args:
        path: ``.h5``; for a single affine map also ``.tfm``, ``.txt`` or ``.mat``.
        transform: to write.

    Raises:
        TransformError: when the format cannot hold it, or a field lies on a sheared grid, which ITK cannot represent.
    """
    import itk

    dims = transform.spatial_dims
    if path.suffix != ".h5" and transform.matrix is None:
        raise TransformError(f"{path}: a displacement field goes into a .h5 or .nii.gz file, not into {path.suffix}")
    if path.suffix != ".h5":
        assert transform.matrix is not None
        itk.transformwrite([_to_itk_affine(transform.matrix, itk.D)], str(path))
        return
    kind = itk.D if transform.matrix is not None else itk.F
    composite = itk.CompositeTransform[kind, dims].New()
    # ITK looks at these arrays without owning them: they have to last until the file is written.
    arrays = [None if isinstance(part, Affine) else _to_itk_vectors(part) for part in transform.parts]
    for part, array in zip(reversed(transform.parts), reversed(arrays), strict=True):
        composite.AddTransform(
            _to_itk_affine(part.matrix, kind) if isinstance(part, Affine) else _to_itk_field(part.grid, array, path)
        )
    writer = itk.TransformFileWriterTemplate[kind].New()
    writer.SetFileName(str(path))
    writer.SetUseCompression(True)
    writer.SetInput(composite)
    writer.Update()


def _to_itk_affine(matrix: Tensor, kind: Any) -> Any:
    import itk

    dims = len(matrix) - 1
    flip = _lps(dims)
    lps = flip @ matrix.numpy() @ flip
    transform = itk.AffineTransform[kind, dims].New()
    if kind is itk.F:
        lps = lps.astype(np.float32)
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetOffset(lps[:-1, -1].tolist())
    return transform


def _to_itk_vectors(part: Displacement) -> np.ndarray:
    """(z, y, x, d) float32, LPS mm."""
    dims = len(part.grid.shape)
    flip = np.diag(_lps(dims))[:dims].reshape(dims, *[1] * dims)
    field = part.field.detach().cpu().float().numpy() * flip.astype(np.float32)
    return np.ascontiguousarray(field.transpose(*range(dims, 0, -1), 0))


def _to_itk_field(grid: Grid, array: np.ndarray | None, path: Path) -> Any:
    """ITK's transform of vectors, which it reads where they are."""
    import itk

    dims = len(grid.shape)
    _, origin, spacing, direction = _itk_geometry(grid)
    if not np.allclose(direction.T @ direction, np.eye(dims), atol=1e-4):
        raise TransformError(f"{path}: the field's grid is sheared, which ITK cannot represent: {direction.tolist()}")
    kind = itk.Image[itk.Vector[itk.F, dims], dims]
    image = itk.PyBuffer[kind].GetImageViewFromArray(array, True)
    image.SetOrigin(origin)
    image.SetSpacing(spacing)
    image.SetDirection(itk.matrix_from_array(direction))
    transform = itk.DisplacementFieldTransform[itk.F, dims].New()
    transform.SetDisplacementField(image)
    return transform


def _itk_geometry(grid: Grid) -> tuple[list[int], list[float], list[float], np.ndarray]:
    """Size, origin, spacing and direction, in LPS."""
    dims = len(grid.shape)
    affine = _lps(dims) @ grid.affine.numpy()
    spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
    return list(grid.shape), affine[:-1, -1].tolist(), spacing.tolist(), affine[:-1, :-1] / spacing


def _lps(dims: int) -> np.ndarray:
    """RAS to LPS and back, homogeneous; in 2-D both axes are flipped."""
    return np.diag([-1.0, -1.0, 1.0, 1.0] if dims == 3 else [-1.0, -1.0, 1.0])
