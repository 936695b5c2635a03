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
"""Images on the grid of another one, each resampled once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from common.io.scans import affine_3d
from common.spatial import affine_to_ddf, warp, warp_scan

__all__ = ["affine_of", "onto_grid", "spaced_grid"]

_SAME = 0.01  # relative difference of spacing that is none


def affine_of(image: MetaTensor) -> np.ndarray:
    """(d+1, d+1) float64 from voxels to RAS mm of an image (C, *S); of a slice, its own plane."""
    return np.asarray(to_affine_nd(image.ndim - 1, np.asarray(image.affine, dtype=np.float64)), dtype=np.float64)


def spaced_grid(
    shape: Sequence[int], affine: np.ndarray, spacing: Sequence[float] | None
) -> tuple[tuple[int, ...], np.ndarray]:
    """The grid of other voxels over the same field of view, with the same middle.

    Args:
        shape: of the grid.
        affine: (d+1, d+1) voxel to world.
        spacing: mm along each axis; None, or within 1 % of the grid's own, leaves the grid.

    Returns:
        shape and affine.
    """
    old = np.linalg.norm(affine[:-1, :-1], axis=0)
    if spacing is None or np.allclose(old, spacing, rtol=_SAME):
        return tuple(shape), affine
    step = np.asarray(spacing, dtype=np.float64) / old
    size = np.maximum(np.round(np.array(shape) / step), 1)
    to_old = np.diag([*step, 1.0])
    to_old[:-1, -1] = (np.array(shape) - 1) / 2 - step * (size - 1) / 2
    return tuple(int(n) for n in size), affine @ to_old


def onto_grid(
    image: MetaTensor, shape: Sequence[int], affine: np.ndarray, matrix: np.ndarray, *, label: bool, padding: str
) -> MetaTensor:
    """Resample an image to a grid, with an affine map between the two.

    Args:
        image: (C, *S).
        shape: of the grid.
        affine: (d+1, d+1) from the grid's voxels to its world.
        matrix: (d+1, d+1) from that world to the image's, RAS mm.
        label: whether it is a label map, of which the nearest voxel is taken; images are interpolated linearly.
        padding: beyond the image, "zeros" (its lowest value where that is negative) or "border"; label maps get 0.

    Returns:
        (C, *shape) whose affine leads to the image's own world, ``matrix @ affine``.
    """
    seen = matrix @ affine
    ddf = affine_to_ddf(torch.from_numpy(np.linalg.solve(affine_of(image), seen)).float(), shape)
    batch = image.as_tensor()[None]
    if label:
        values = warp(batch, ddf, mode="nearest", padding="zeros")
    else:
        values = warp_scan(batch, ddf) if padding == "zeros" else warp(batch, ddf, padding=padding)
    meta: Mapping[str, object] = {name: value for name, value in image.meta.items() if name != "affine"}
    return MetaTensor(values[0], affine=torch.from_numpy(affine_3d(seen)), meta=meta)
