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
"""What is wrong with a scan, or odd about it, before it is registered."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from common.io.headers import Placement, nifti_placement
from common.io.scans import Scan

__all__ = ["PairError", "check_header", "check_size", "check_values", "check_window", "require_place"]

_TINY = 16  # voxels along an axis
_HUGE = 512**3  # voxels
_FLAT = 5.0  # longest to shortest side of a voxel
_PLAUSIBLE = (0.02, 50.0)  # mm, a side of a voxel
_APART = 0.1  # voxels by which sform and qform may differ: they are rounded differently
_AIR = -200.0  # HU; CT of a patient has air, around -1000
_UNITS = {"meter": ("metres", 1000), "micron": ("micrometres", 0.001)}


class PairError(ValueError):
    """Two scans that cannot be registered as they are; the message names the file, what was found and what to do."""


def check_header(scan: Scan) -> list[str]:
    """Look at how a file says that its image lies in the world.

    Args:
        scan: from a file.

    Returns:
        warnings: neither sform nor qform, both but different, voxels of an unlikely size.

    Raises:
        PairError: when lengths are not in millimetres, or voxels have no volume.
    """
    sides = np.linalg.norm(scan.affine_3d[:3, :3], axis=0)
    if not np.isfinite(scan.affine_3d).all() or abs(np.linalg.det(scan.affine_3d[:3, :3])) <= 1e-9 * sides.prod():
        raise PairError(
            f"{scan.path}: the header's affine {scan.affine_3d.round(4).tolist()} gives voxels without a volume; "
            "expected three axes in space: repair the header"
        )
    found: list[str] = []
    placement = _placement(scan)
    if placement is not None:
        if placement.unit in _UNITS:
            name, factor = _UNITS[placement.unit]
            raise PairError(
                f"{scan.path}: the header's unit is {name} (xyzt_units), with voxels of {_rounded(scan.spacing)}; "
                f"expected millimetres. If that is so, multiply the affine by {factor}; if the numbers are millimetres "
                "already, set the unit to mm (nibabel: image.header.set_xyzt_units('mm')); then save the image"
            )
        if placement.sform is None and placement.qform is None:
            found.append(
                f"{scan.path}: neither sform nor qform is set, so where the image lies, and which side is left, is "
                f"unknown; voxels of {_rounded(scan.spacing)} mm along right, anterior, superior are assumed"
            )
        elif placement.sform is not None and placement.qform is not None:
            found += _disagreement(scan, placement.sform, placement.qform)
    low, high = min(scan.spacing), max(scan.spacing)
    if high < _PLAUSIBLE[0] or low > _PLAUSIBLE[1]:
        found.append(
            f"{scan.path}: voxels of {_rounded(scan.spacing)} mm, expected between {_PLAUSIBLE[0]} and "
            f"{_PLAUSIBLE[1]} mm; is the header in metres or micrometres? If so, write it in mm"
        )
    return found


def require_place(scan: Scan) -> None:
    """Refuse a scan whose header places it nowhere, where that place decides.

    Raises:
        PairError: when neither sform nor qform is set.
    """
    placement = _placement(scan)
    if placement is not None and placement.sform is None and placement.qform is None:
        raise PairError(
            f"{scan.path}: neither sform nor qform is set, so where the image lies is unknown, and tools differ in "
            "what they assume; expected a header that places it. Set one, or let `affine` be 'affine', 'rigid' or "
            "'centre', which finds the place from the images"
        )


def check_size(scan: Scan, spacing: Sequence[float] | None = None, stacks: bool = False) -> list[str]:
    """Look at the number and the shape of the voxels.

    Args:
        scan: from a file.
        spacing: that the scan will be resampled to, mm, for every axis; None for its own.
        stacks: whether the last axis counts slices, which are registered one by one.

    Returns:
        warnings: a short axis, thick slices, more voxels than memory may hold.

    Raises:
        PairError: when an axis has one voxel only.
    """
    shape = scan.array.shape
    plane = shape[:2] if stacks else shape
    if min(shape) == 1:
        axis = shape.index(1)
        raise PairError(
            f"{scan.path} has shape {shape}, one voxel along axis {axis}: nothing can move there. Expected a volume, "
            "or a 2-D image stored as (x, y, 1): move that axis to the end"
        )
    found: list[str] = []
    if min(plane) < _TINY:
        found.append(
            f"{scan.path} has shape {shape}, fewer than {_TINY} voxels along an axis: there is little to register, and "
            "the networks were not trained on such scans"
        )
    sides = scan.spacing if spacing is None else tuple(spacing)
    if not stacks and max(sides) > _FLAT * min(sides):
        found.append(
            f"{scan.path} has voxels of {_rounded(sides)} mm, longer along one axis by a factor above {_FLAT:g}: "
            "motion across thick slices is seen poorly. Slices that correspond one to one can be registered as stacks"
        )
    voxels = float(np.prod([n * old / new for n, old, new in zip(shape, scan.spacing, sides, strict=True)]))
    if voxels > _HUGE:
        size = voxels * 4 / 2**30
        coarser = np.array(sides) * (voxels / _HUGE) ** (1 / len(shape))
        found.append(
            f"{scan.path}: {voxels / 1e6:.0f} million voxels, more than {_HUGE ** (1 / 3):.0f}^3. One image takes "
            f"{size:.1f} GB, one field {size * len(shape):.1f} GB, and a network many times that; a `spacing` of "
            f"{_rounded(coarser)} mm or more would do with less"
        )
    return found


def check_values(scan: Scan) -> None:
    """Refuse values that are none.

    Raises:
        PairError: for values that are not finite, or an image of a single value.
    """
    if scan.array.dtype.kind == "f":
        wrong = scan.array.size - int(np.isfinite(scan.array).sum())
        if wrong:
            raise PairError(
                f"{scan.path}: {wrong} values that are not finite (NaN or infinite) of {scan.array.size}, expected "
                "numbers only; replace them, as by numpy.nan_to_num"
            )
    low, high = scan.array.min(), scan.array.max()
    if low == high:
        raise PairError(
            f"{scan.path}: every voxel is {low}, there is nothing to register; is it the right file, or an empty mask?"
        )


def check_window(scan: Scan, window: Sequence[float], preset: bool) -> list[str]:
    """Look at whether a window of intensities fits a scan.

    Args:
        scan: from a file.
        window: (low, high).
        preset: whether it is one for CT, in Hounsfield units.

    Returns:
        a warning when what should be CT has no air.

    Raises:
        PairError: when no voxel, or every voxel, is below or above the window.
    """
    low, high = float(scan.array.min()), float(scan.array.max())
    if high <= window[0] or low >= window[1]:
        raise PairError(
            f"{scan.path}: all values lie between {low:g} and {high:g}, outside of the window {tuple(window)} of "
            "`intensity`, which would leave a constant image; choose another `intensity`, such as 'mri', which takes "
            "the range from the image"
        )
    if preset and low > _AIR:
        return [
            f"{scan.path}: the smallest value is {low:g}, but CT in Hounsfield units has air at about -1000; was the "
            "scan rescaled, or is it no CT? Convert it to Hounsfield units, or choose another `intensity`"
        ]
    return []


def _placement(scan: Scan) -> Placement | None:
    return nifti_placement(scan.path) if scan.path.is_file() else None


def _disagreement(scan: Scan, sform: np.ndarray, qform: np.ndarray) -> list[str]:
    """Whether a header's two placements are different ones: mirrored, or apart at some corner."""
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        return [
            f"{scan.path}: sform and qform disagree on handedness, one is a mirror image of the other, so left and "
            "right may be exchanged; the sform is used. Find out which is right, and set both to it"
        ]
    ends = product(*[(0, n - 1) for n in scan.array.shape])
    corners = np.array([[*end, *[0] * (3 - len(end)), 1] for end in ends], dtype=np.float64)
    apart = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
    if apart > _APART * min(scan.spacing):
        return [
            f"{scan.path}: sform and qform place the image up to {apart:.3g} mm apart; the sform is used, other tools "
            "may use the qform. Set both to the right one"
        ]
    return []


def _rounded(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{value:.3g}" for value in values)
