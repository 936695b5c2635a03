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
"""What a label map must be, and which labels it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.io.grids import require_same_grid
from common.io.headers import image_dims
from common.io.scans import Scan, load_image

__all__ = ["label_values", "load_label_map", "require_label_map"]

_MOST = 1000


def load_label_map(path: str | Path, frame: int | None = None) -> Scan:
    """Read the label map of a scan, of which one frame is registered if ``frame`` is given.

    A map that has frames too is read at this one; a single map belongs to whatever frame was chosen.

    Raises:
        FileNotFoundError, ScanError: as :func:`common.io.load_image`.
    """
    return load_image(path, frame if frame is not None and image_dims(path) > 3 else None)


def require_label_map(image: str | Path | Scan, label: str | Path | Scan) -> None:
    """Raise unless a file is a label map on the grid of its scan.

    Args:
        image: the scan, or its file.
        label: the label map, or its file.

    Raises:
        GridError: when it lies on another grid.
        ValueError: for fractional values.
    """
    found = _loaded(label)
    require_same_grid(_loaded(image), found)
    wrong = found.array[found.array != np.round(found.array)]
    if wrong.size:
        raise ValueError(
            f"{found.path} must hold whole numbers, as a label map does, but has {wrong.size} others, such as "
            f"{wrong[0]:g}; is it an image?"
        )


def label_values(label: str | Path | Scan) -> list[int]:
    """The labels of a map, without 0, in order.

    Args:
        label: the label map, or its file.

    Raises:
        ValueError: for more than 1000 labels, which are intensities rather.
    """
    found = _loaded(label)
    values = np.unique(found.array)
    if len(values) > _MOST:
        raise ValueError(f"{found.path} has {len(values)} different values, more than a label map has; is it an image?")
    return [int(value) for value in values if value != 0]


def _loaded(scan: str | Path | Scan) -> Scan:
    return scan if isinstance(scan, Scan) else load_image(scan)
