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
"""What lies outside of a scan."""

from __future__ import annotations

from torch import Tensor

from common.spatial.warping import warp

__all__ = ["outside_value", "warp_scan"]


def outside_value(image: Tensor) -> float:
    """0, or the lowest value of a scan that has negative ones, which in CT is air."""
    lowest = float(image.min())
    return lowest if lowest < 0 else 0.0  # also where the lowest is NaN


def warp_scan(image: Tensor, ddf: Tensor, fill: float | None = None) -> Tensor:
    """Pull a scan back along a field, linearly, with a value of its own kind outside of it.

    Args:
        image: (B, C, *Sm), float.
        ddf: (B, d, *Sf), voxels.
        fill: the value outside. Default: :func:`outside_value`.

    Returns:
        (B, C, *Sf).
    """
    fill = outside_value(image) if fill is None else fill
    return warp(image - fill, ddf, padding="zeros") + fill if fill else warp(image, ddf, padding="zeros")
