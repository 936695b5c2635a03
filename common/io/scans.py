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
"""Scans in and out: an array in the file's own axis order and the affine that places it in the world."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from common.io.files import writing

__all__ = ["ScanError", "Scan", "load_image", "load_series", "save_image", "save_series"]

logger = logging.getLogger(__name__)

_NIFTI = (".nii", ".nii.gz")
_ITK = (".nrrd", ".nhdr", ".mha", ".mhd")
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class ScanError(ValueError):
    """A file that is no scalar 2-D or 3-D image, or cannot be read; the message names it."""


@dataclass(frozen=True)
class Scan:
    """One scalar image.

    Attributes:
        array: (*S), 2-D or 3-D, in the file's own axis order. The file's own dtype, unless it scales its values.
        affine: (d+1,d+1) float64 from voxel indices to RAS mm. Of a 2-D image it is the in-plane part.
        path: where it came from.
        affine_3d: (4,4) placement of a 2-D image in space, which saving it again needs; ``affine`` for a 3-D image.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    affine_3d: np.ndarray

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return self.array.ndim

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm along each axis."""
        return tuple(float(n) for n in np.linalg.norm(self.affine_3d[:3, : self.spatial_dims], axis=0))

    @property
    def orientation(self) -> str:
        """Axis codes, such as ``RAS``: the direction towards which each axis runs."""
        return "".join(str(code) for code in nib.aff2axcodes(self.affine_3d)[: self.spatial_dims])


def load_image(path: str | Path, frame: int | None = None) -> Scan:
    """Read a scan without resampling or reorienting anything.

    NIfTI by nibabel, with its intensity scaling applied; ``.nrrd``, ``.mha`` and others by ITK, whose LPS affine is
    turned to RAS. Trailing axes of length 1 are dropped, so a 2-D image stored as (x, y, 1) is 2-D.

    Args:
        path: of the file.
        frame: which one of a series (its last axis), counted from 0, or from its end if negative.

    Returns:
        the scan.

    Raises:
        FileNotFoundError: when there is no such file.
        ScanError: for an unknown extension, a damaged file, vectors, colours, complex numbers, a series when no frame
            is named, a frame that it does not have.

    Warns:
        UserWarning: when a NIfTI header places the image nowhere (neither sform nor qform).
    """
    path = Path(path)
    array, affine = _read(path)
    return _scan(_one_frame(array, path, frame), affine, path)


def load_series(path: str | Path) -> list[Scan]:
    """Read every frame of a series, such as a map of probabilities a class; a single image is a series of one.

    Raises:
        FileNotFoundError, ScanError: as :func:`load_image`.
    """
    path = Path(path)
    array, affine = _read(path)
    if array.ndim != 4:
        return [_scan(_one_frame(array, path, None), affine, path)]
    return [_scan(_one_frame(array[..., k], path, None), affine, path) for k in range(array.shape[-1])]


def save_image(
    path: str | Path, array: np.ndarray, affine: np.ndarray, *, overwrite: bool = True, description: str = ""
) -> Path:
    """Write a NIfTI image; the file appears whole or not at all.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``; its folder is made.
        array: (*S), 2-D or 3-D. 2-D is stored as (x, y, 1). Booleans are stored as bytes, half precision as float32,
            64-bit integers as int32.
        affine: (3,3) or (4,4) from voxel indices to RAS mm.
        overwrite: replace an existing file. The default is to replace, as a repeated run should give its results.
        description: at most 79 characters for the header.

    Returns:
        the path.

    Raises:
        FileExistsError: when the file exists and ``overwrite`` is false.
        ValueError: for another extension, a wrong affine, or integers that do not fit into int32.
    """
    array = np.asarray(array)
    if array.ndim not in (2, 3):
        raise ValueError(f"{path}: expected a 2-D or 3-D array, found shape {array.shape}")
    stored = _storable(array, path)
    image = nib.Nifti1Image(stored[..., None] if stored.ndim == 2 else stored, affine_3d(affine))
    _set_header(image, description)
    with writing(path, _NIFTI, overwrite) as partial:
        nib.save(image, partial)
    return Path(path)


def save_series(path: str | Path, arrays: Sequence[np.ndarray], affine: np.ndarray, *, overwrite: bool = True) -> Path:
    """Write images of one grid as the frames of a NIfTI series, (x, y, z, frames).

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        arrays: (*S) each, 2-D or 3-D.
        affine: of all of them.
        overwrite: replace an existing file.
    """
    frames = np.stack([np.asarray(array) for array in arrays], axis=-1)
    stored = _storable(frames, path)
    image = nib.Nifti1Image(stored[:, :, None] if stored.ndim == 3 else stored, affine_3d(affine))
    _set_header(image, "")
    with writing(path, _NIFTI, overwrite) as partial:
        nib.save(image, partial)
    return Path(path)


def affine_3d(affine: np.ndarray) -> np.ndarray:
    """A (3,3) affine of the plane as the (4,4) affine that keeps it at z = 0; a (4,4) affine as it is.

    Raises:
        ValueError: for any other shape, or a matrix that maps volumes to nothing.
    """
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape == (3, 3):
        lifted = np.eye(4)
        lifted[:2, :2], lifted[:2, 3] = affine[:2, :2], affine[:2, 2]
        affine = lifted
    if affine.shape != (4, 4):
        raise ValueError(f"expected a 3x3 or 4x4 affine, found shape {affine.shape}")
    if abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"the affine is singular: {affine.tolist()}")
    return affine


def in_plane_affine(affine: np.ndarray, dimensions: int) -> np.ndarray:
    """The affine of the image's own axes. A plane that is not axial has no (3,3) form: its lengths are kept."""
    if dimensions == 3:
        return affine
    plane = np.eye(3)
    plane[:2, :2], plane[:2, 2] = affine[:2, :2], affine[:2, 3]
    if abs(np.linalg.det(plane[:2, :2])) < 1e-6:
        plane = np.diag([*np.linalg.norm(affine[:3, :2], axis=0), 1.0])
    return plane


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    name = path.name.lower()
    if name.endswith(_NIFTI):
        return _read_nifti(path)
    if name.endswith(_ITK):
        return _read_itk(path)
    raise ScanError(f"{path}: unknown image format, expected one of {[*_NIFTI, *_ITK]}")


def _scan(array: np.ndarray, affine: np.ndarray, path: Path) -> Scan:
    if array.dtype.byteorder not in ("=", "|"):
        array = array.astype(array.dtype.newbyteorder("="))
    return Scan(array, in_plane_affine(affine, array.ndim), path, affine)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image: Any = nib.load(path)
        dtype = image.get_data_dtype()
        _require_scalar(dtype, path)
        with _damage_named(path):
            array = np.asanyarray(image.dataobj)
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError) as error:
        raise ScanError(f"{path} is no readable NIfTI file: {error}") from error
    if image.header["sform_code"] == 0 and image.header["qform_code"] == 0:
        spacing = [round(float(side), 4) for side in image.header.get_zooms()[:3]]
        warnings.warn(
            f"{path}: neither sform nor qform is set, so where the image lies is unknown; "
            f"assuming nibabel's centred default with spacing {spacing}",
            stacklevel=3,
        )
    return array, np.asarray(image.affine, dtype=np.float64)


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import itk

    with _damage_named(path):
        image = itk.imread(str(path))
    if image.GetNumberOfComponentsPerPixel() != 1:
        raise ScanError(f"{path} has {image.GetNumberOfComponentsPerPixel()} values a voxel, expected a scalar image")
    array = np.asarray(itk.array_from_image(image)).T.copy()
    _require_scalar(array.dtype, path)
    dimensions = image.GetImageDimension()
    spatial = min(dimensions, 3)
    affine = np.eye(4)
    direction = np.asarray(image.GetDirection(), dtype=np.float64)[:spatial, :spatial]
    affine[:spatial, :spatial] = direction * np.asarray(image.GetSpacing(), dtype=np.float64)[:spatial]
    affine[:spatial, 3] = np.asarray(image.GetOrigin(), dtype=np.float64)[:spatial]
    return array, _LPS @ affine


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Readers raise many kinds of errors on damaged files, and none of them names the file."""
    try:
        yield
    except ScanError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError) as error:
        raise ScanError(f"{path} could not be read, it may be damaged or truncated: {error}") from error


def _require_scalar(dtype: np.dtype, path: Path) -> None:
    if dtype.fields is not None or dtype.kind == "V":
        raise ScanError(f"{path} holds colours or records ({dtype}), expected one number a voxel")
    if dtype.kind == "c":
        raise ScanError(f"{path} holds complex numbers ({dtype}); save the magnitude first")


def _one_frame(array: np.ndarray, path: Path, frame: int | None) -> np.ndarray:
    """An image without axes of length 1 at its end."""
    shape = array.shape
    if frame is not None:
        count = shape[3] if array.ndim == 4 else 1
        if array.ndim > 4 or not -count <= frame < count:
            raise ScanError(f"{path} has shape {shape}: it has no frame {frame}, as its frames are 0 to {count - 1}")
        array = array[..., frame] if array.ndim == 4 else array
    return array.reshape(image_shape(array.shape, path))


def image_shape(shape: Sequence[int], path: Path) -> tuple[int, ...]:
    """The shape of a scan without axes of length 1 at its end.

    Args:
        shape: as the file has it, of one frame.
        path: of the file, for messages.

    Raises:
        ScanError: when it is not that of one image in 2-D or 3-D.
    """
    own = tuple(shape)
    while len(own) > 2 and own[-1] == 1:
        own = own[:-1]
    if len(own) > 3:
        series = f"a series; choose a frame from 0 to {own[3] - 1} (--frame)"
        kind = "a vector image or displacement field" if len(own) == 5 else series
        raise ScanError(f"{path} has shape {tuple(shape)}, expected 2 or 3 axes longer than 1: it looks like {kind}")
    if len(own) < 2 or 0 in own:
        raise ScanError(f"{path} has shape {tuple(shape)}, expected a 2-D or 3-D image")
    return own


def _storable(array: np.ndarray, path: str | Path) -> np.ndarray:
    """The array in a type that NIfTI readers know. nibabel refuses some and warns of others."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype in (np.int64, np.uint64, np.uint32):
        if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
            raise ValueError(f"{path}: integers from {array.min()} to {array.max()} do not fit into int32")
        return array.astype(np.int32)
    return array


def _set_header(image: Any, description: str) -> None:
    """Both transforms under 'scanner', for readers that look at only one of them, and mm as unit."""
    image.set_sform(image.affine, code=1)
    # A sheared affine has no quaternion; the sform alone then places the image.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.set_qform(image.affine, code=1, strip_shears=True)
    if not np.allclose(image.get_qform(), image.affine, atol=1e-4):
        image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
