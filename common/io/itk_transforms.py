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

ITK's composites act on a point with the part that was added last first; ours are listed in the order of action. ITK
takes seconds to load: it is asked for what :mod:`common.io.itk_hdf5` does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.io.itk_geometry import TransformError, from_lps_affine, from_lps_field, itk_geometry, lps_matrix
from common.io.itk_hdf5 import read_hdf5_transform, write_hdf5_transform
from common.spatial.transform import Affine, Displacement, Grid, SpatialTransform

__all__ = ["TransformError", "read_itk_transform", "write_itk_transform"]

_HDF5 = (".h5", ".hdf5")


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
    if path.suffix in _HDF5:
        known = read_hdf5_transform(path)
        if known is not None:
            return known
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
        return [from_lps_affine(matrix)]
    if kind.startswith("BSpline"):
        if fixed is None:
            raise TransformError(f"{path} holds a {kind}, which needs the fixed image to be sampled on: name it too")
        return [_sampled(transform, fixed)]
    raise TransformError(f"{path} holds a {kind}; linear transforms, displacement fields and B-splines are read")


def _from_itk_field(image: Any) -> Displacement:
    import itk

    direction = itk.array_from_matrix(image.GetDirection())
    vectors = np.array(itk.array_view_from_image(image))
    return from_lps_field(vectors, np.array(image.GetOrigin()), np.array(image.GetSpacing()), direction)


def _sampled(transform: Any, grid: Grid) -> Displacement:
    """ITK's own sampling of a transform on a grid."""
    import itk

    dims = len(grid.shape)
    vectors = itk.Image[itk.Vector[itk.F, dims], dims]
    sampler = itk.TransformToDisplacementFieldFilter[vectors, itk.D].New()
    size, origin, spacing, direction = itk_geometry(grid)
    sampler.SetSize(size)
    sampler.SetOutputOrigin(origin.tolist())
    sampler.SetOutputSpacing(spacing.tolist())
    sampler.SetOutputDirection(itk.matrix_from_array(direction))
    sampler.SetTransform(transform)
    sampler.Update()
    return _from_itk_field(sampler.GetOutput())


def write_itk_transform(path: Path, transform: SpatialTransform) -> None:
    """Write one affine map, or a composite of anything.

    Args:
        path: ``.h5`` for a composite, see :func:`common.io.itk_hdf5.write_hdf5_transform`; for a single affine map also
            ``.tfm``, ``.txt`` or ``.mat``.
        transform: to write.

    Raises:
        TransformError: when the format cannot hold it, or a field lies on a sheared grid, which ITK cannot represent.
    """
    if path.suffix in _HDF5:
        write_hdf5_transform(path, transform)
        return
    if transform.matrix is None:
        raise TransformError(f"{path}: a displacement field goes into a .h5 or .nii.gz file, not into {path.suffix}")
    import itk

    itk.transformwrite([_to_itk_affine(transform.matrix)], str(path))


def _to_itk_affine(matrix: Tensor) -> Any:
    import itk

    lps = lps_matrix(matrix)
    transform = itk.AffineTransform[itk.D, len(lps) - 1].New()
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetOffset(lps[:-1, -1].tolist())
    return transform
