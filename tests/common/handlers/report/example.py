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
"""Small pairs to report on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.handlers.report import ReportInputs
from common.io import Scan

SHAPE = (13, 11, 7)


def scan(array: np.ndarray, affine: np.ndarray | None = None, name: str = "scan.nii.gz") -> Scan:
    """A scan in memory; ``affine`` is (4, 4)."""
    placed = np.eye(4) if affine is None else np.asarray(affine, dtype=float)
    keep = [*range(array.ndim), 3]
    return Scan(array, placed[np.ix_(keep, keep)], Path(name), placed)


def pair(dims: int = 3, affine: np.ndarray | None = None, **others: Any) -> ReportInputs:
    """Two scans of noise on one grid, without displacement."""
    generator = np.random.default_rng(0)
    shape = SHAPE[:dims]
    moving, fixed = (generator.random(shape).astype("float32") for _ in range(2))
    given: dict[str, Any] = {
        "moving": scan(moving, affine, "moving.nii.gz"),
        "fixed": scan(fixed, affine, "fixed.nii.gz"),
        "before": moving,
        "moved": moving,
        "ddf": np.zeros((1, dims, *shape), dtype="float32"),
    }
    return ReportInputs(**{**given, **others})


def scaling(dims: int, by: float) -> np.ndarray:
    """The field of a map that enlarges around the first voxel: (1, d, *S)."""
    grid = np.meshgrid(*map(np.arange, SHAPE[:dims]), indexing="ij")
    return np.stack(grid)[None].astype("float32") * (by - 1)
