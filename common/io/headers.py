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
"""What a scan's header alone says, for lists of scans that are too many to load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from common.io.scans import _ITK, _NIFTI, ScanError, _damage_named, image_shape

__all__ = ["Placement", "image_dims", "nifti_placement", "scan_dims"]


@dataclass(frozen=True, eq=False)
class Placement:
    """What a NIfTI header says of where an image lies.

    Attributes:
        unit: of lengths: "mm", "meter", "micron" or "unknown".
        sform: (4,4) from voxels to RAS, or None when it is not set.
        qform: the same of the other transform.
    """

    unit: str
    sform: np.ndarray | None
    qform: np.ndarray | None


def nifti_placement(path: str | Path) -> Placement | None:
    """Read the placement of a NIfTI file; no voxel is read.

    Args:
        path: of the file.

    Returns:
        the placement, None for files of other formats.
    """
    if not Path(path).name.lower().endswith(_NIFTI):
        return None
    image = nib.load(path)
    header = image.header
    try:
        qform = image.get_qform(coded=True)[0]  # type: ignore[attr-defined]
    except nib.spatialimages.HeaderDataError:  # a quaternion that is none
        qform = None
    sform = image.get_sform(coded=True)[0]  # type: ignore[attr-defined]
    return Placement(header.get_xyzt_units()[0], sform, qform)  # type: ignore[attr-defined]


def image_dims(path: str | Path) -> int:
    """How many axes a file has, without those of length 1 at the end; no voxel is read.

    Args:
        path: of the file.

    Returns:
        2 or 3; more for a series.

    Raises:
        FileNotFoundError: when there is no such file.
        ScanError: for an unknown extension or a header that cannot be read.
    """
    shape = _shape(Path(path))
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape)


def scan_dims(path: str | Path, frame: int | None = None) -> int:
    """Whether :func:`common.io.load_image` will read a scan in 2-D or 3-D; no voxel is read.

    Args:
        path: of the file.
        frame: of a series, as for ``load_image``.

    Returns:
        2 or 3.

    Raises:
        FileNotFoundError: when there is no such file.
        ScanError: as ``load_image``, among others for a series of which no frame is named.
    """
    shape = _shape(Path(path))
    return len(image_shape(shape[:3] if frame is not None and len(shape) == 4 else shape, Path(path)))


def _shape(path: Path) -> Sequence[int]:
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    name = path.name.lower()
    if not name.endswith((*_NIFTI, *_ITK)):
        raise ScanError(f"{path}: unknown image format, expected one of {[*_NIFTI, *_ITK]}")
    try:
        with _damage_named(path):
            return _nifti_shape(path) if name.endswith(_NIFTI) else _itk_shape(path)
    except nib.filebasedimages.ImageFileError as error:
        raise ScanError(f"{path} is no readable NIfTI file: {error}") from error


def _nifti_shape(path: Path) -> Sequence[int]:
    image = nib.load(path)
    return tuple(image.shape)  # type: ignore[attr-defined]


def _itk_shape(path: Path) -> Sequence[int]:
    import itk

    reader = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
    if reader is None:
        raise ScanError(f"{path} could not be read, it may be damaged or truncated")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return tuple(int(reader.GetDimensions(axis)) for axis in range(reader.GetNumberOfDimensions()))
