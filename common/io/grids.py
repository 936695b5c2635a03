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
"""Do two images lie on the same grid? With a tolerance, and an answer that shows both values."""

from __future__ import annotations

from itertools import product

import numpy as np

from common.io.scans import Scan

__all__ = ["GridError", "grid_difference", "require_same_grid", "same_grid"]


class GridError(ValueError):
    """Two images that should share a grid do not; the message has both files and both values."""


def same_grid(a: Scan, b: Scan, tolerance: float = 0.01) -> bool:
    """Whether both have the same shape and no corner lies further apart than ``tolerance`` voxels.

    Distances of corners, not of matrix entries, because a small rotation moves the far corner of a large image a lot.
    Headers written by different tools differ by rounding (float32 quaternions), which the tolerance forgives.
    """
    return not grid_difference(a, b, tolerance)


def grid_difference(a: Scan, b: Scan, tolerance: float = 0.01) -> str:
    """What differs, with both values, or an empty string.

    Args:
        a, b: the scans.
        tolerance: in voxels of the finer image.

    Returns:
        text such as ``shape (3, 4, 5) != (3, 4, 6); spacing (1.0, 1.0, 1.0) != (1.0, 1.0, 2.0)``.
    """
    if a.array.shape != b.array.shape:
        return _describe(a, b, [("shape", a.array.shape, b.array.shape)])
    ends = product(*[(0, n - 1) for n in a.array.shape])
    corners = np.array([[*end, *[0] * (3 - len(end)), 1] for end in ends], dtype=np.float64)
    apart = np.linalg.norm(corners @ (a.affine_3d - b.affine_3d).T, axis=1).max()
    if apart <= tolerance * min(*a.spacing, *b.spacing):
        return ""
    return _describe(a, b, []) + f" (up to {apart:.3g} mm apart)"


def require_same_grid(a: Scan, b: Scan, tolerance: float = 0.01) -> None:
    """Raise unless both lie on the same grid.

    Raises:
        GridError: names both files and what differs.
    """
    difference = grid_difference(a, b, tolerance)
    if difference:
        raise GridError(f"{a.path} and {b.path} are not on the same grid: {difference}")


def _describe(a: Scan, b: Scan, found: list[tuple[str, object, object]]) -> str:
    def rounded(values: np.ndarray | tuple[float, ...]) -> tuple[float, ...]:
        return tuple(float(n) for n in np.round(values, 4))

    if a.spatial_dims != b.spatial_dims:
        return f"shape {a.array.shape} != {b.array.shape}"
    if a.orientation != b.orientation:
        found.append(("orientation", a.orientation, b.orientation))
    if not np.allclose(a.spacing, b.spacing, rtol=1e-4):
        found.append(("spacing", rounded(a.spacing), rounded(b.spacing)))
    if not np.allclose(a.affine_3d[:3, 3], b.affine_3d[:3, 3], atol=1e-3):
        found.append(("origin", rounded(a.affine_3d[:3, 3]), rounded(b.affine_3d[:3, 3])))
    if not found:
        found.append(("affine", a.affine_3d.round(4).tolist(), b.affine_3d.round(4).tolist()))
    return "; ".join(f"{name} {first} != {second}" for name, first, second in found)
