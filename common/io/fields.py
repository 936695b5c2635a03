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
"""Displacement fields in and out, in the two forms that other tools read.

``itk``: what ITK, ANTs and Slicer call a displacement field: NIfTI (X,Y,Z,1,3), intent 1007, float32, on the fixed
grid, in mm, along the LPS axes: a physical point x of the fixed image corresponds to x + d(x) of the moving image.
``l2r``: Learn2Reg's (X,Y,Z,3) in voxels along array axes, which is WarpZoo's own field with the channel last.
2-D fields are (X,Y,1,1,2) and (X,Y,2).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from common.io.files import writing
from common.io.scans import ScanError, affine_3d
from common.io.sidecar import ROLES, write_sidecar

__all__ = ["FIELD_FORMATS", "field_from_lps", "field_to_lps", "load_field", "save_field"]

FIELD_FORMATS = ("itk", "l2r")
_MEANING = {
    "itk": ({"format": "itk", "units": "mm", "axes": "LPS"}, "x -> x + d(x)"),
    "l2r": ({"format": "l2r", "units": "voxel", "axes": "array"}, "i -> i + d(i)"),
}
_VECTOR_INTENT = 1007
_ROWS = 8  # that are converted at a time
_NIFTI = (".nii", ".nii.gz")


def field_to_lps(ddf: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray | None = None) -> np.ndarray:
    """Displacements in voxels to displacements in LPS mm.

    Voxel i of the fixed grid lies at Af i and its partner at Am (i + u), so d = Am (i + u) - Af i. With one affine
    for both this is A u: the rotation and the spacing matter, the origin does not.

    Args:
        ddf: (d,*S) voxels of the moving grid as displacement from the voxel index i of the fixed grid.
        fixed_affine: (d+1,d+1), voxel indices to RAS mm.
        moving_affine: the same of the moving grid. Default: the fixed one.

    Returns:
        (d,*S) float64 mm.
    """
    d = ddf.shape[0]
    fixed, moving = _affines(fixed_affine, moving_affine, d)
    displacement = np.tensordot(moving[:d, :d], ddf.astype(np.float64), axes=1)
    return _flip(d) * (displacement + _positions(moving - fixed, ddf.shape[1:]))


def field_from_lps(field: np.ndarray, fixed_affine: np.ndarray, moving_affine: np.ndarray | None = None) -> np.ndarray:
    """The inverse of :func:`field_to_lps`: (d,*S) LPS mm to (d,*S) float64 voxels."""
    d = field.shape[0]
    fixed, moving = _affines(fixed_affine, moving_affine, d)
    to_moving = np.linalg.inv(moving)
    displacement = np.tensordot(to_moving[:d, :d], _flip(d) * field.astype(np.float64), axes=1)
    return displacement + _positions(to_moving @ fixed - np.eye(d + 1), field.shape[1:])


def save_field(
    path: str | Path,
    ddf: Tensor | np.ndarray,
    fixed_affine: Tensor | np.ndarray,
    moving_affine: Tensor | np.ndarray | None = None,
    fmt: str = "itk",
    *,
    overwrite: bool = True,
    sidecar: bool | None = None,
    roles: tuple[str, str] = ROLES,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a field that another tool applies to the moving image in its own file.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; its folder is made.
        ddf: (d,*S) or (1,d,*S), voxels, on the grid of the *file* of the fixed image. A field from a network that saw
            reoriented or padded images has to be put back onto that grid first: ``common.spatial.world.field_on_grid``.
        fixed_affine: (d+1,d+1) or, in 2-D too, (4,4): voxel indices to RAS mm.
        moving_affine: the same of the moving image. Default: the fixed one.
        fmt: ``"itk"`` or ``"l2r"``.
        overwrite: replace an existing file; as in :func:`common.io.save_image`.
        sidecar: also write ``<name>.json`` that says in words what the numbers mean, since intent 1007 alone does not.
            Default: for ``"itk"`` only, as a Learn2Reg submission holds nothing but fields.
        roles: what the sidecar calls the image whose grid the field lies on, and the other.
        about: what else the sidecar says.

    Returns:
        the path.

    Raises:
        ValueError: for an unknown format, a shape that is no field, values that are not finite, or (``"itk"``) a
            sheared grid, which ITK cannot represent.
        FileExistsError: when the file exists and ``overwrite`` is false.
    """
    field = _as_field(ddf, path)
    d = field.shape[0]
    fixed = np.asarray(fixed_affine, dtype=np.float64)
    moving = None if moving_affine is None else np.asarray(moving_affine, dtype=np.float64)
    placement = affine_3d(fixed)
    if fmt == "itk":
        _refuse_shear(placement, path)
        # NIfTI's vectors are the fifth axis; the third (2-D) and fourth are there to be skipped.
        stored = _lps_channels_last(field, fixed, moving).reshape(*field.shape[1:], *[1] * (4 - d), d)
    elif fmt == "l2r":
        stored = np.moveaxis(field, 0, -1)
    else:
        raise ValueError(f"unknown field format '{fmt}', expected one of {list(FIELD_FORMATS)}")
    image = nib.Nifti1Image(np.ascontiguousarray(stored, dtype=np.float32), placement)
    image.set_qform(placement, code=1)
    image.set_sform(placement, code=1)
    image.header.set_xyzt_units("mm")
    if fmt == "itk":
        image.header.set_intent(_VECTOR_INTENT)
    with writing(path, _NIFTI, overwrite) as partial:
        nib.save(image, partial)
    if fmt == "itk" if sidecar is None else sidecar:
        affines = placement, placement if moving is None else affine_3d(moving)
        meaning, formula = _MEANING[fmt]
        known = {f"{roles[0]}_shape": list(field.shape[1:]), **(about or {})}
        write_sidecar(Path(path), meaning, affines, roles=roles, formula=formula, about=known, overwrite=overwrite)
    return Path(path)


def load_field(
    path: str | Path,
    fixed_affine: Tensor | np.ndarray | None = None,
    moving_affine: Tensor | np.ndarray | None = None,
    fmt: str = "itk",
) -> Tensor:
    """Read a field that :func:`save_field`, ANTs or a Learn2Reg participant has written.

    Args:
        path: of the NIfTI file.
        fixed_affine: of the fixed image. Default: that of the file, which lies on the fixed grid. When given it has
            to agree with the file to a hundredth of a voxel for ``"itk"``; Learn2Reg's headers mean nothing.
        moving_affine: of the moving image. Default: the fixed one.
        fmt: ``"itk"`` or ``"l2r"``.

    Returns:
        (1,d,*S) float32 in voxels.

    Raises:
        FileNotFoundError: when there is no such file.
        ScanError: when its shape is not that of the format.
        ValueError: for an unknown format, or a file that lies on another grid than ``fixed_affine`` says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no field at {path}")
    if fmt not in FIELD_FORMATS:
        raise ValueError(f"unknown field format '{fmt}', expected one of {list(FIELD_FORMATS)}")
    image: Any = nib.load(path)
    values = np.asarray(image.dataobj, dtype=np.float64)
    if fmt == "l2r":
        return torch.from_numpy(_l2r_channels(values, path)).float()[None]
    if values.ndim != 5 or values.shape[3] != 1 or values.shape[4] not in (2, 3):
        raise ScanError(
            f"{path} has shape {values.shape}, expected an ITK displacement field (X,Y,Z,1,3) or (X,Y,1,1,2)"
        )
    d = values.shape[4]
    field = np.moveaxis(values.reshape(*values.shape[:d], d), -1, 0)
    own = np.asarray(image.affine, dtype=np.float64)
    given = own if fixed_affine is None else affine_3d(np.asarray(fixed_affine, dtype=np.float64))
    _refuse_other_grid(own, given, field.shape[1:], path)
    moving = given if moving_affine is None else affine_3d(np.asarray(moving_affine, dtype=np.float64))
    return torch.from_numpy(field_from_lps(field, given, moving)).float()[None]


def _lps_channels_last(field: np.ndarray, fixed: np.ndarray, moving: np.ndarray | None) -> np.ndarray:
    """(*S, d) float32: :func:`field_to_lps` by rows: a volume in double precision takes many times its size."""
    stored = np.empty((*field.shape[1:], field.shape[0]), dtype=np.float32)
    for first in range(0, field.shape[1], _ROWS):
        affines = [None if affine is None else affine @ _shift(first, len(affine)) for affine in (fixed, moving)]
        slab = field_to_lps(field[:, first : first + _ROWS], *affines)  # type: ignore[arg-type]
        stored[first : first + _ROWS] = np.moveaxis(slab, 0, -1)
    return stored


def _shift(rows: int, size: int) -> np.ndarray:
    """(size, size): the voxel that a slab which starts at this row calls its first."""
    matrix = np.eye(size)
    matrix[0, -1] = rows
    return matrix


def _affines(fixed: np.ndarray, moving: np.ndarray | None, d: int) -> tuple[np.ndarray, np.ndarray]:
    pair = []
    for affine in (fixed, fixed if moving is None else moving):
        full = affine_3d(affine)
        keep = [*range(d), 3]
        pair.append(full[np.ix_(keep, keep)])
    return pair[0], pair[1]


def _positions(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(d,*S): the matrix (d+1,d+1) applied to every voxel index, one axis at a time, without an index grid."""
    d = len(shape)
    total = matrix[:d, d].reshape(d, *[1] * d)
    for axis, length in enumerate(shape):
        steps = np.arange(length, dtype=np.float64).reshape([-1 if k == axis else 1 for k in range(d)])
        total = total + matrix[:d, axis].reshape(d, *[1] * d) * steps
    return total


def _flip(d: int) -> np.ndarray:
    """RAS to LPS and back, as a factor for (d,*S): in 2-D both axes are flipped."""
    return np.array([-1.0, -1.0, 1.0][:d]).reshape(d, *[1] * d)


def _as_field(ddf: Tensor | np.ndarray, path: str | Path) -> np.ndarray:
    field = ddf.detach().cpu().float().numpy() if isinstance(ddf, Tensor) else np.asarray(ddf)
    if field.ndim > 3 and field.shape[0] == 1 and field.shape[1] == field.ndim - 2:
        field = field[0]
    d = field.shape[0]
    if d not in (2, 3) or field.ndim != d + 1:
        raise ValueError(f"{path}: expected a field (d,*S) or (1,d,*S) with d = 2 or 3, found shape {tuple(ddf.shape)}")
    if not np.isfinite(field).all():
        raise ValueError(f"{path}: the field has {int((~np.isfinite(field)).sum())} values that are not finite")
    return field


def _refuse_shear(affine: np.ndarray, path: str | Path) -> None:
    direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        raise ValueError(f"{path}: the fixed grid is sheared, which ITK cannot represent: {affine.tolist()}")


def _refuse_other_grid(own: np.ndarray, given: np.ndarray, shape: tuple[int, ...], path: Path) -> None:
    d = len(shape)
    corner = np.array([*(n - 1 for n in shape), *[0] * (3 - d), 1.0])
    apart = max(np.linalg.norm((own - given) @ point) for point in (corner, np.array([0, 0, 0, 1.0])))
    voxel = np.linalg.norm(given[:3, :d], axis=0).min()
    if apart > 0.01 * voxel:
        raise ValueError(
            f"{path} lies on another grid than the fixed image, {apart:.3f} mm apart at a corner: the file has the "
            f"affine {own.round(4).tolist()}, the image {given.round(4).tolist()}"
        )


def _l2r_channels(values: np.ndarray, path: Path) -> np.ndarray:
    """Channels first; Learn2Reg's evaluation also takes (3,X,Y,Z)."""
    if values.ndim in (3, 4):
        d = values.ndim - 1
        if values.shape[-1] == d:
            return np.ascontiguousarray(np.moveaxis(values, -1, 0))
        if values.shape[0] == d:
            return values
    raise ScanError(f"{path} has shape {values.shape}, expected a Learn2Reg field (X,Y,Z,3) or (X,Y,2)")
