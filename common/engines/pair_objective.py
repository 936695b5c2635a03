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
"""The loss of one pair as a function of the control points that change its field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, max_pool2d, max_pool3d

from common.engines.coarser_pair import coarser_field, coarser_values
from common.engines.spline_flow import SplineFlow
from common.engines.trainer import require_finite
from common.engines.values import PairValues
from common.losses import LNCC, Diffusion, WeightedLosses
from common.losses.checks import as_float
from common.spatial import compose, digital_jacobian_determinants, warp

__all__ = ["FIELDS", "PairObjective", "default_loss"]

FIELDS = ("ddf", "inverse_ddf")

_REPAIRS = 16  # each takes back up to half of the change where it folds: what is left after so many is nothing
_LARGE = 2**20  # voxels from which on a coarser grid is worth its while: on fewer, the full one is better and quick
_LEAST = 32  # voxels along an axis that a coarser grid must have
_SLAB = 2**17  # voxels that are searched for folds at a time: all simplices of a large field would need gigabytes


class PairObjective:
    """A pair whose field is ``phi(exp(v)(x))``, with the map ``phi`` that was there and a spline ``v``.

    Args:
        values: ``moving``, ``fixed`` and ``ddf``, all of one batch size; ``inverse_ddf``, masks and what else the loss
            takes where there is any.
        loss: of these values and of ``moved``, ``inverse_moved`` and so on; None for :func:`default_loss`.
        flow: ``exp(v)`` on the grid of ``ddf``.
        voxels: how many voxels of the full resolution one of ``ddf`` joins along each axis; None for 1.

    Attributes:
        before: the loss to begin with.

    Raises:
        NonFiniteLossError: when the loss is no number to begin with.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        loss: WeightedLosses | None,
        flow: SplineFlow,
        voxels: Sequence[int] | None = None,
    ) -> None:
        self.values = {n: _differentiable(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        self.start = {name: self.values.pop(name) for name in FIELDS if name in values}
        self.loss_function = default_loss(values) if loss is None else loss.to(self.start["ddf"].device)
        self.flow, self.voxels = flow, voxels
        inputs = [self.loss_function.inputs[n] for n, weight in self.loss_function.weights.items() if weight]
        self.back = any(name.startswith("inverse_") for names in inputs for name in names)
        with torch.no_grad():
            total, terms = self._terms(self.start)
        require_finite(total, terms, values, 0, "or check the loss of the refinement")
        self.before = float(total)
        if voxels is None:
            self._allowed = {name: _folded(field)[0] for name, field in self.start.items()}

    def coarser(self) -> PairObjective | None:
        """The same at half the resolution, with the same control points; None if there are not many voxels anyway.

        Axes of fewer than 64 voxels are left as they are.
        """
        size = self.start["ddf"].shape[2:]
        voxels = [2 if n >= 2 * _LEAST else 1 for n in size]
        if math.prod(size) < _LARGE or max(voxels) == 1 or max(voxels) > self.flow.step:
            return None
        fields = {name: coarser_field(field, voxels) for name, field in self.start.items()}
        return PairObjective(coarser_values(self.values, voxels) | fields, self.loss_function, self.flow, voxels)

    def control_points(self) -> Tensor:
        """Control points (B, d, *s) of no change, in spacings."""
        return self.flow.control_points(self.start["ddf"])

    def fields(self, points: Tensor, back: bool = True) -> dict[str, Tensor]:
        """The field, and its inverse where there was one and it is wanted, (B, d, *S) each."""
        found = {"ddf": compose(self.start["ddf"], self.flow.displacement(points, self.voxels))}
        if back and "inverse_ddf" in self.start:
            found["inverse_ddf"] = compose(self.flow.displacement(-points, self.voxels), self.start["inverse_ddf"])
        return found

    def loss(self, points: Tensor) -> Tensor:
        """What is to become small."""
        return self.loss_of(self.fields(points, self.back))

    def loss_of(self, fields: Mapping[str, Tensor]) -> Tensor:
        """The same for the fields of some control points."""
        return self._terms(fields)[0]

    def _terms(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = self.loss_function(PairValues(self.values, fields))
        return total, terms

    def unfolded(self, points: Tensor) -> dict[str, Tensor]:
        """The fields, the change taken back where it folds until neither folds more volume than at the start.

        Gently at first, as most folds are small and vanish with little of the change; then ever wider around them.
        """
        for attempt in range(_REPAIRS):
            if not bool(points.any()):
                break
            fields = self.fields(points)
            folds = [self._new_folds(name, fields, volume) for name, volume in self._allowed.items()]
            marked = [where for where in folds if where is not None]
            if not marked:
                return fields
            reach, part = (attempt // 2, 0.5) if attempt < 4 else (attempt - 2, 1.0)
            near = _near(torch.stack(marked).amax(0), self.flow.spacing, reach)
            # What lies beyond the other grid leaves no mark on this one.
            points = points * (1 - part * near) if bool(near.any()) else points * 0.5
        return self.start

    def _new_folds(self, name: str, fields: Mapping[str, Tensor], allowed: float) -> Tensor | None:
        """Voxels (B, 1, *S) of the fixed grid where a field folds; None if it folds no more volume than allowed."""
        volume, where = _folded(fields[name])
        if volume <= allowed:
            return None
        if name == "ddf":
            return where
        # On the moving grid the fold of an inverse lies where the field leads to; wide enough not to be stepped over.
        return warp(_widened(where, 2), fields["ddf"])


def _differentiable(values: Tensor) -> Tensor:
    """The values in full precision; a copy if an inference mode made them, as that cannot be differentiated through."""
    values = as_float(values).detach()
    return values.clone() if values.is_inference() else values


def default_loss(values: Mapping[str, Any]) -> WeightedLosses:
    """LNCC of window 9 and the diffusion energy of the field, alike in both directions where there are two.

    Args:
        values: what there is: ``inverse_ddf`` for two directions, ``fixed_mask`` and ``moving_mask`` for where the
            moved image and the fixed one that was moved back count.
    """
    sides = {"": ("moved", "fixed", "fixed_mask", "ddf")}
    if "inverse_ddf" in values:
        sides["inverse_"] = ("inverse_moved", "moving", "moving_mask", "inverse_ddf")
    terms: dict[str, Any] = {}
    for side, (moved, target, mask, ddf) in sides.items():
        images = [moved, target] + [mask] * (mask in values)
        terms[f"{side}similarity"] = {"term": LNCC(9), "inputs": images, "weight": 1 / len(sides)}
        terms[f"{side}smoothness"] = {"term": Diffusion(), "inputs": [ddf], "weight": 1 / len(sides)}
    return WeightedLosses(terms)


def _folded(ddf: Tensor) -> tuple[float, Tensor]:
    """The volume that a field folds, and in which voxels (B, 1, *S); the outermost do not count."""
    count, volume = ddf.shape[2], 0.0
    rows = max(1, _SLAB * count // max(1, ddf[:, 0].numel()))
    where = torch.zeros_like(ddf[:, :1])
    inner = where[(..., *(slice(1, -1) for _ in range(ddf.dim() - 2)))]
    for start in range(0, max(count - 2, 1), rows):
        lowest = digital_jacobian_determinants(ddf[:, :, start : start + rows + 2])
        volume += float(lowest.neg().clamp_min_(0).sum(dtype=torch.float64))
        inner[:, 0, start : start + rows] = (lowest.amin(1) < 0).to(ddf.dtype)
    return volume, where


def _near(where: Tensor, spacing: int, reach: int) -> Tensor:
    """How near to a marked voxel control points are, in [0, 1]: (B, 1, *S) to (B, 1, *s).

    Args:
        where: 1 in marked voxels, else 0.
        spacing: voxels between control points.
        reach: at so many spacings from a marked voxel all control points are near it still.
    """
    flat = where.dim() == 4
    blocks = (max_pool2d if flat else max_pool3d)(where, spacing, spacing, ceil_mode=True)
    # Beyond, the change must fade out.
    return (avg_pool2d if flat else avg_pool3d)(_widened(blocks, reach), 3, 1, 1, count_include_pad=False)


def _widened(where: Tensor, reach: int) -> Tensor:
    """Mark the neighbours of what is marked too, so many along each axis."""
    return (max_pool2d if where.dim() == 4 else max_pool3d)(where, 2 * reach + 1, 1, reach)
