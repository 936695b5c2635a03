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
"""The grid on which a network sees a pair, whether it registers images or the slices of two stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.io.common_grid import common_grid
from common.io.scans import Scan

__all__ = ["pair_grid"]


def pair_grid(
    moving: Scan,
    fixed: Scan,
    stacks: bool = False,
    tolerance: float = 0.01,
    spacing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """:func:`common.io.common_grid`, or the plane that holds the slices of two stacks.

    Slice k of one stack is registered to slice k of the other, so both must have been cut alike: nothing is resampled
    along the last axis.

    Args:
        moving: the moving scan.
        fixed: the fixed scan.
        stacks: whether both are stacks of slices along their last axis.
        tolerance: relative difference of spacing that is ignored.
        spacing: that both take, in mm; not for stacks.

    Returns:
        ``spatial_size``, two numbers for stacks, and ``spacing`` (None where nothing needs resampling).

    Raises:
        ValueError: when one of two stacks is none, or they differ in the number of slices or in voxel size.
    """
    if not stacks:
        return common_grid(moving, fixed, tolerance, spacing)
    scans = [moving, fixed]
    for scan in scans:
        if scan.array.ndim != 3:
            raise ValueError(f"{scan.path} is {scan.array.ndim}-D; a stack of slices is 3-D")
    (first, second), shapes = scans, [scan.array.shape for scan in scans]
    if shapes[0][2] != shapes[1][2]:
        raise ValueError(
            f"{first.path} has {shapes[0][2]} slices and {second.path} has {shapes[1][2]}: slices are registered one "
            "to one"
        )
    if not np.allclose(first.spacing, second.spacing, rtol=tolerance):
        raise ValueError(
            f"{first.path} has voxels of {np.round(first.spacing, 4)} mm and {second.path} of "
            f"{np.round(second.spacing, 4)} mm: resample one of them"
        )
    return {"spatial_size": [max(pair) for pair in zip(*(shape[:2] for shape in shapes), strict=True)], "spacing": None}
