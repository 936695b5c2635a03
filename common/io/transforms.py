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
"""Transforms in and out of files, in the forms that other tools read and write.

=========================  =====================================================  ==============================
form                       file                                                   what it holds
=========================  =====================================================  ==============================
``itk``                    ``.nii.gz``, intent 1007, LPS mm                       the total displacement
``composite``              ``.h5`` of ITK                                         affine map and field, apart
``affine``                 ``.tfm``, ``.txt``, ``.mat`` of ITK and ANTs           an affine map
``fsl``                    ``.mat``, four lines of text (read only)               FLIRT's matrix
``l2r``                    ``disp_*.nii.gz`` of Learn2Reg, voxels                 the total displacement
=========================  =====================================================  ==============================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from common.io.fields import load_field, save_field
from common.io.files import writing
from common.io.itk_transforms import TransformError, read_itk_transform, write_itk_transform
from common.io.scans import Scan
from common.io.sidecar import ROLES, write_sidecar
from common.spatial.transform import Affine, Grid, SpatialTransform

__all__ = ["TransformError", "grid_of", "load_transform", "load_transforms", "save_transform"]

logger = logging.getLogger(__name__)

_NIFTI = (".nii", ".nii.gz")
_ITK = (".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")


def grid_of(scan: Scan) -> Grid:
    """The grid of a scan; of a slice, its own plane."""
    return Grid(scan.array.shape, torch.from_numpy(scan.affine))


def load_transform(
    path: str | Path, *, fixed: Grid | None = None, moving: Grid | None = None, fmt: str | None = None
) -> SpatialTransform:
    """Read a transform that pulls the moving image back to the fixed one.

    Args:
        path: of the file; see above.
        fixed: the fixed image's grid, which FSL's and Learn2Reg's files are about but do not hold.
        moving: the same of the moving image.
        fmt: one of the forms above. Default: by the file's name and content.

    Returns:
        the transform, RAS mm.

    Raises:
        FileNotFoundError: when there is no such file.
        TransformError: for a file of another kind, or one that needs a grid that is not given.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no transform at {path}")
    fmt = _form(path) if fmt is None else fmt
    if fmt in ("composite", "affine"):
        return read_itk_transform(path, fixed)
    if fmt == "itk":
        own = Grid(*_grid_of_field(path))
        return SpatialTransform.from_ddf(load_field(path), own, own)
    if fmt not in ("l2r", "fsl"):
        raise TransformError(f"unknown form '{fmt}', expected one of itk, composite, affine, fsl, l2r")
    if fixed is None or moving is None:
        raise TransformError(f"{path} is in the form '{fmt}', which says nothing without both images: name both")
    if fmt == "l2r":
        return _read_l2r(path, fixed, moving)
    logger.info(
        "%s is read as a matrix of FSL's FLIRT. Greedy and c3d write such files too, with another meaning: "
        "have c3d_affine_tool write those for ITK (-oitk)",
        path,
    )
    return SpatialTransform((Affine(_from_fsl(path, fixed, moving)),))


def load_transforms(
    paths: Sequence[str | Path], *, fixed: Grid | None = None, moving: Grid | None = None
) -> SpatialTransform:
    """Read a list as ``antsApplyTransforms -t`` takes it, such as ``1Warp.nii.gz 0GenericAffine.mat``.

    The first one acts first on a point of the fixed image, the last one leads to the moving image. (ANTs calls this the
    reverse order, as it thinks of the moving image, which goes through the last one first.)

    A path that ends in ``:inverse`` is inverted, numerically if it is a field.

    Args:
        paths: of the files.
        fixed: the fixed image's grid, for the forms that need one.
        moving: the same of the moving image.

    Raises:
        FileNotFoundError, TransformError: as :func:`load_transform`.
        ValueError: when there are none.
    """
    parts: list[Any] = []
    for name in (str(path) for path in paths):
        turned = name.endswith(":inverse")
        one = load_transform(name.removesuffix(":inverse"), fixed=fixed, moving=moving)
        parts += (one.inverse()[0] if turned else one).parts
    if not parts:
        raise ValueError("no transform was named")
    return SpatialTransform(tuple(parts))


def save_transform(
    path: str | Path,
    transform: SpatialTransform,
    fixed: Scan,
    moving: Scan,
    fmt: str | None = None,
    *,
    overwrite: bool = True,
    roles: tuple[str, str] = ROLES,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a transform and, beside it, ``<name>.json`` that says in words what the numbers mean.

    Args:
        path: ``.nii.gz`` for a displacement field, ``.h5`` for a composite, ``.tfm``, ``.txt`` or ``.mat`` for an
            affine map.
        transform: from ``fixed`` to ``moving``.
        fixed: the scan whose grid a field is sampled on.
        moving: the other one.
        fmt: ``itk`` or ``l2r`` for ``.nii.gz``; else the extension says it.
        overwrite: replace an existing file.
        roles: what the sidecar calls ``fixed`` and ``moving``: of an inverse the other way round.
        about: what else the sidecar says.

    Returns:
        the path.

    Raises:
        TransformError: when the form cannot hold the transform.
        FileExistsError: when the file exists and ``overwrite`` is false.
    """
    path = Path(path)
    if path.name.endswith(_NIFTI):
        ddf = transform.ddf(grid_of(fixed), grid_of(moving))
        said: dict[str, Any] = {"overwrite": overwrite, "roles": roles, "about": about}
        return save_field(path, ddf, fixed.affine_3d, moving.affine_3d, fmt or "itk", **said)
    with writing(path, _ITK, overwrite) as partial:
        write_itk_transform(partial, transform)
    content = {
        "parts": [type(part).__name__.lower() for part in transform.parts],
        "order": f"as they act on a point of the {roles[0]} image; ITK's file lists them in reverse",
        **{f"{role}_shape": list(scan.array.shape) for role, scan in zip(roles, (fixed, moving), strict=True)},
        **(about or {}),
    }
    meaning = {"format": "ITK transform", "units": "mm", "axes": "LPS"}
    affines = fixed.affine_3d, moving.affine_3d
    write_sidecar(path, meaning, affines, roles=roles, formula="x -> T(x)", about=content, overwrite=overwrite)
    return path


def _form(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(_NIFTI):
        # NIfTI's vectors are the fifth axis; Learn2Reg's fields have no fifth axis.
        return "itk" if len(_image(path).shape) == 5 else "l2r"
    if name.endswith((".h5", ".hdf5")):
        return "composite"
    if name.endswith(".mat") and _fsl_numbers(path) is not None:
        return "fsl"
    if name.endswith(_ITK):
        return "affine"
    raise TransformError(f"{path}: unknown kind of file, expected one of {[*_NIFTI, *_ITK]}")


def _image(path: Path) -> Any:
    try:
        return nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise TransformError(f"{path} cannot be read as NIfTI: {error}") from error


def _grid_of_field(path: Path) -> tuple[tuple[int, ...], torch.Tensor]:
    image = _image(path)
    dims = image.shape[-1]
    keep = [*range(dims), 3]
    return image.shape[:dims], torch.from_numpy(np.asarray(image.affine, dtype=np.float64)[np.ix_(keep, keep)])


def _read_l2r(path: Path, fixed: Grid, moving: Grid) -> SpatialTransform:
    ddf = load_field(path, fmt="l2r")
    if tuple(ddf.shape[2:]) != fixed.shape:
        raise TransformError(f"{path} is a field of {tuple(ddf.shape[2:])} voxels, the fixed image has {fixed.shape}")
    return SpatialTransform.from_ddf(ddf, fixed, moving)


def _fsl_numbers(path: Path) -> np.ndarray | None:
    """The 4x4 numbers of a text file, or None when it is something else."""
    try:
        numbers = np.loadtxt(path)
    except (ValueError, UnicodeDecodeError):
        return None
    return numbers if numbers.shape == (4, 4) else None


def _from_fsl(path: Path, fixed: Grid, moving: Grid) -> torch.Tensor:
    """FLIRT's matrix takes the moving image's scaled voxels to the fixed image's; ours leads back, in RAS mm."""
    numbers = _fsl_numbers(path)
    if numbers is None or len(fixed.shape) != 3:
        raise TransformError(f"{path} is no matrix of FLIRT (four lines of four numbers) between two volumes")
    to_moving = np.linalg.inv(numbers)
    from_moving_fsl = moving.affine.numpy() @ np.linalg.inv(_fsl_scaling(moving))
    to_fixed_fsl = _fsl_scaling(fixed) @ np.linalg.inv(fixed.affine.numpy())
    return torch.from_numpy(from_moving_fsl @ to_moving @ to_fixed_fsl)


def _fsl_scaling(grid: Grid) -> np.ndarray:
    """Voxel indices to FSL's millimetres, whose first axis is counted from the other end in neurological storage."""
    affine = grid.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    scaling = np.diag([*spacing, 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        scaling[0, 0], scaling[0, 3] = -spacing[0], (grid.shape[0] - 1) * spacing[0]
    return scaling
