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
"""The grid on which two scans meet in a network."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from common.io.scans import Scan

__all__ = ["common_grid"]

logger = logging.getLogger(__name__)


def common_grid(
    moving: Scan, fixed: Scan, tolerance: float = 0.01, spacing: Sequence[float] | None = None
) -> dict[str, Any]:
    """Size and spacing that hold both scans once their axes point right, anterior and superior.

    Smaller scans are padded to it. Scans of one spacing keep their voxels; where the spacings differ by more than
    ``tolerance``, both take the fixed scan's, and a warning says so.

    Args:
        moving: the moving scan.
        fixed: the fixed scan, of as many axes.
        tolerance: relative difference of spacing that is ignored.
        spacing: mm along right, anterior and superior that both take; the default is the fixed scan's, as said.

    Returns:
        ``spatial_size`` and ``spacing`` (None where nothing needs resampling), options of
        ``common.transforms.scan_transforms``.
    """
    (moving_size, moving_spacing), (fixed_size, fixed_spacing) = (_ras_size_and_spacing(s) for s in (moving, fixed))
    if spacing is not None:
        sizes = [(moving_size, moving_spacing), (fixed_size, fixed_spacing)]
        both = [[_resampled(*axis) for axis in zip(*own, spacing, strict=True)] for own in sizes]
        return {"spatial_size": [max(pair) for pair in zip(*both, strict=True)], "spacing": [float(s) for s in spacing]}
    if np.allclose(moving_spacing, fixed_spacing, rtol=tolerance):
        return {"spatial_size": [max(pair) for pair in zip(moving_size, fixed_size, strict=True)], "spacing": None}
    logger.warning(
        "%s has spacing %s mm and %s has %s mm: the network sees both at the latter; the field is written on the fixed "
        "scan's own grid",
        *(moving.path, np.round(moving_spacing, 4), fixed.path, np.round(fixed_spacing, 4)),
    )
    resampled = [_resampled(*axis) for axis in zip(moving_size, moving_spacing, fixed_spacing, strict=True)]
    size = [max(pair) for pair in zip(resampled, fixed_size, strict=True)]
    return {"spatial_size": size, "spacing": [float(s) for s in fixed_spacing]}


def _resampled(size: int, spacing: float, new: float) -> int:
    """Voxels that hold an axis; what rounding adds to a whole number is none."""
    return math.ceil(size * spacing / new - 1e-4)


def _ras_size_and_spacing(scan: Scan) -> tuple[list[int], list[float]]:
    """Size and spacing in the axis order of a scan turned to RAS; the axes of a slice are left as they are."""
    shape, spacing = list(scan.array.shape), list(scan.spacing)
    if scan.spatial_dims == 2:
        return shape, spacing
    world = nib.orientations.io_orientation(scan.affine)[:, 0].astype(int).tolist()
    order = [world.index(axis) for axis in range(3)]
    return [shape[axis] for axis in order], [spacing[axis] for axis in order]
