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
"""Distances between corresponding points."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.metrics.base import RegistrationMetric, check_definition, nan_mean, per_item_spacing
from common.spatial import warp_points

__all__ = ["TargetRegistrationError"]


class TargetRegistrationError(RegistrationMetric):
    """Mean distance in mm between points and their targets, per item.

    ``metric(points, target)`` compares points that have been moved already. ``metric(points, target, spacing, ddf)``
    first moves ``points``, given on the fixed grid, by the field: the pull-back field says where a fixed point lies in
    the moving image, so ``target`` are the corresponding points of the moving image and ``spacing`` is the moving
    image's. ``affine``, from voxels of the moving image to its world, takes the place of ``spacing`` and holds for
    grids that are sheared too, such as one that an affine alignment was resampled to. Rows of NaN (padding of items
    with fewer points) do not count.

    Args:
        spacing: mm per axis of the image the targets are in; the third input overrides it.
        definition: how the field is read between voxels: ``"standard"`` linearly as images are warped, ``"learn2reg"``
            by cubic splines as the challenge's evaluation does.
    """

    def __init__(self, spacing: Any = None, definition: str = "standard") -> None:
        super().__init__()
        self.spacing = spacing
        self.definition = check_definition(definition)

    def _compute_tensor(  # type: ignore[override]
        self,
        points: Tensor,
        target: Tensor,
        spacing: Any = None,
        ddf: Tensor | None = None,
        affine: Tensor | None = None,
    ) -> Tensor:
        if points.ndim != 3 or points.shape[2] not in (2, 3) or points.shape != target.shape:
            raise ValueError(
                "points and target must both be (B, N, d) with d 2 or 3, "
                f"got {tuple(points.shape)} and {tuple(target.shape)}"
            )
        moved = points if ddf is None else self._move(points, ddf)
        steps = _steps(affine, points) if affine is not None else self._scale(spacing, points)
        distance = ((moved.double() - target.double()) @ steps.mT).norm(dim=2)
        return nan_mean(distance, 1)[:, None].float()

    def _scale(self, spacing: Any, points: Tensor) -> Tensor:
        """(B, d, d) mm along each axis."""
        mm = per_item_spacing(self.spacing if spacing is None else spacing, points.shape[0], points.shape[2])
        return torch.tensor(mm, dtype=torch.float64, device=points.device).diag_embed()

    def _move(self, points: Tensor, ddf: Tensor) -> Tensor:
        if self.definition == "standard":
            return warp_points(points, ddf)
        return torch.stack([p + _cubic_sample(u, p) for p, u in zip(points, ddf, strict=True)])


def _steps(affine: Tensor, points: Tensor) -> Tensor:
    """(B, d, d) what a step along each voxel axis is in mm, of affines (B, d+1, d+1) or one (d+1, d+1).

    Raises:
        ValueError: for another shape.
    """
    batch, _, dims = points.shape
    matrix = torch.as_tensor(affine).to(points.device, torch.float64)
    matrix = matrix.expand(batch, *matrix.shape) if matrix.ndim == 2 else matrix
    if tuple(matrix.shape) != (batch, dims + 1, dims + 1):
        raise ValueError(
            f"affine must be {dims + 1} x {dims + 1}, or {batch} of these, for points {tuple(points.shape)}, "
            f"got {tuple(matrix.shape)}"
        )
    return matrix[:, :-1, :-1]


def _cubic_sample(ddf: Tensor, points: Tensor) -> Tensor:
    """Displacements (N, d) of a field (d, \\*S) at voxel coordinates (N, d) by cubic splines; 0 outside the grid."""
    where = points.detach().double().cpu().numpy().T
    known = np.isfinite(where).all(axis=0)
    values = np.full(where.T.shape, np.nan)
    for axis, channel in enumerate(ddf.detach().double().cpu().numpy()):
        values[known, axis] = ndimage.map_coordinates(channel, where[:, known], order=3)
    return torch.from_numpy(values).to(points)
