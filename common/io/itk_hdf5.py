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
"""ITK's ``.h5`` transforms without ITK, which takes seconds to load.

The layout is that of ITK's own writer (HDF5TransformIO, ITK 5.4): ``/TransformGroup/k`` with a ``TransformType`` such
as ``AffineTransform_double_3_3``, and its numbers in ``TransformParameters`` and ``TransformFixedParameters``. Number 0
is the composite itself, which has no numbers; of the others the last acts first on a point.

- An affine map: the matrix by rows and the translation; fixed, the centre c: ``x -> M (x - c) + c + t``.
- A field: its vectors, (z, y, x, d); fixed, size, origin, spacing and direction by rows.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from common.io.itk_geometry import (
    TransformError,
    from_lps_affine,
    from_lps_field,
    itk_geometry,
    lps_matrix,
    lps_vectors,
)
from common.spatial.transform import Affine, Displacement, SpatialTransform

__all__ = ["read_hdf5_transform", "write_hdf5_transform"]

_ITK = "5.4.0"  # whose layout this is
_CHUNK = 2**20  # numbers
_LEVEL = 1  # of gzip: higher ones take longer and save next to nothing of a field
_GROUP = "TransformGroup"
# Before ITK 4.12 names lacked a letter.
_PARAMETERS = ("TransformParameters", "TranformParameters")
_FIXED = ("TransformFixedParameters", "TranformFixedParameters")


def write_hdf5_transform(path: Path, transform: SpatialTransform) -> None:
    """Write a composite.

    An affine map alone is written in double precision. With a field all is in single precision, which is what fields
    are computed in, and half of the size; ITK's readers take either.

    Args:
        path: of the file.
        transform: to write.

    Raises:
        TransformError: for a field on a sheared grid, which ITK cannot represent.
    """
    kind: type[np.floating] = np.float32 if transform.matrix is None else np.float64
    with h5py.File(path, "w", libver=("v108", "v108")) as file:
        about = {
            "ITKVersion": _ITK,
            "HDFVersion": f"HDF5 library version: {h5py.version.hdf5_version}",
            "OSName": platform.system(),
            "OSVersion": platform.release(),
        }
        for name, text in about.items():
            _write_text(file, name, text)
        _write_type(file, 0, "CompositeTransform", transform.spatial_dims, kind)
        for number, part in enumerate(reversed(transform.parts), start=1):
            _write_part(file, number, part, kind, path)


def _write_part(file: h5py.File, number: int, part: Affine | Displacement, kind: type[np.floating], path: Path) -> None:
    if isinstance(part, Affine):
        matrix = lps_matrix(part.matrix)
        dims = len(matrix) - 1
        name, fixed = "AffineTransform", np.zeros(dims)
        values = np.concatenate([matrix[:-1, :-1].ravel(), matrix[:-1, -1]])
    else:
        size, origin, spacing, direction = itk_geometry(part.grid, path)
        dims = len(size)
        name, fixed = "DisplacementFieldTransform", np.concatenate([size, origin, spacing, direction.ravel()])
        values = lps_vectors(part).ravel()
    group = _write_type(file, number, name, dims, kind)
    group.create_dataset(_FIXED[0], data=fixed.astype(np.float64))
    pressed: dict[str, Any] = {"chunks": (min(len(values), _CHUNK),), "compression": "gzip", "compression_opts": _LEVEL}
    group.create_dataset(_PARAMETERS[0], data=values.astype(kind, copy=False), shuffle=True, **pressed)


def _write_type(file: h5py.File, number: int, name: str, dims: int, kind: type[np.floating]) -> h5py.Group:
    group = file.create_group(f"{_GROUP}/{number}")
    _write_text(group, "TransformType", f"{name}_{'float' if kind is np.float32 else 'double'}_{dims}_{dims}")
    return group


def _write_text(group: h5py.Group, name: str, text: str) -> None:
    """As ITK does: one string of variable length."""
    group.create_dataset(name, data=[text], dtype=h5py.string_dtype("ascii"))


def read_hdf5_transform(path: Path) -> SpatialTransform | None:
    """Read a composite, or single transforms, of affine maps, translations and fields.

    Args:
        path: of the file.

    Returns:
        the transform, or None when a part is of a kind that only ITK knows, such as a B-spline or a rotation by angles.

    Raises:
        TransformError: for a damaged file, or another one than of a transform.
    """
    parts: list[Affine | Displacement] = []
    try:
        with h5py.File(path, "r") as file:
            groups = [file[_GROUP][name] for name in sorted(file[_GROUP], key=int)]
            kinds = [group["TransformType"].asstr()[0] for group in groups]
            if any(kind.startswith("Composite") for kind in kinds[1:]):
                return None
            for kind, group in reversed(list(zip(kinds, groups, strict=True))):
                if kind.startswith("Composite"):
                    continue
                part = _part(kind, group)
                if part is None:
                    return None
                parts.append(part)
    except (OSError, KeyError, ValueError, IndexError, TypeError) as error:
        raise TransformError(f"{path} cannot be read as an ITK transform: {error}") from error
    if not parts:
        raise TransformError(f"{path} holds no transform")
    return SpatialTransform(tuple(parts))


def _part(kind: str, group: h5py.Group) -> Affine | Displacement | None:
    name, _, dims_in, dims_out = kind.rsplit("_", 3)
    dims = int(dims_in)
    if dims_in != dims_out or dims not in (2, 3):
        return None
    if name == "DisplacementFieldTransform":
        fixed = _numbers(group, _FIXED)
        size, origin, spacing = fixed[: 3 * dims].reshape(3, dims)
        vectors = _numbers(group, _PARAMETERS, np.float32).reshape(*size[::-1].astype(int), dims)
        return from_lps_field(vectors, origin, spacing, fixed[3 * dims :].reshape(dims, dims))
    if name == "IdentityTransform":
        return Affine(torch.eye(dims + 1, dtype=torch.float64))
    matrix = np.eye(dims + 1)
    if name == "TranslationTransform":
        matrix[:-1, -1] = _numbers(group, _PARAMETERS)
        return from_lps_affine(matrix)
    if name not in ("AffineTransform", "MatrixOffsetTransformBase"):
        return None
    values, centre = _numbers(group, _PARAMETERS), _numbers(group, _FIXED)
    matrix[:-1, :-1] = values[: dims * dims].reshape(dims, dims)
    matrix[:-1, -1] = values[dims * dims :] + centre - matrix[:-1, :-1] @ centre
    return from_lps_affine(matrix)


def _numbers(group: h5py.Group, names: tuple[str, str], kind: type[np.floating] = np.float64) -> np.ndarray:
    return np.asarray(group[names[0] if names[0] in group else names[1]][()], dtype=kind)
