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
from common.io.scans import load_image

__all__ = ["label_values", "require_label_map"]

_MOST = 1000


def require_label_map(image: str | Path, label: str | Path) -> None:
    """Raise unless a file is a label map on the grid of its scan.

    Args:
        image: file of the scan.
        label: file of the label map.

    Raises:
        GridError: when it lies on another grid.
        ValueError: for fractional values.
    """
    found = load_image(label)
    require_same_grid(load_image(image), found)
    if not np.array_equal(found.array, np.round(found.array)):
        raise ValueError(f"{found.path} must hold whole numbers, as a label map does; is it an image?")


def label_values(path: str | Path) -> list[int]:
    """The labels of a map, without 0, in order.

    Args:
        path: of the label map.

    Raises:
        ValueError: for more than 1000 labels, which are intensities rather.
    """
    values = np.unique(load_image(path).array)
    if len(values) > _MOST:
        raise ValueError(f"{path} has {len(values)} different values, more than a label map has; is it an image?")
    return [int(value) for value in values if value != 0]
