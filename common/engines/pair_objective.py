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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, max_pool2d, max_pool3d, pad

from common.engines.trainer import require_finite
from common.engines.values import PairValues
from common.losses import LNCC, Diffusion, WeightedLosses
from common.losses.checks import as_float
from common.spatial import (
    bspline_displacement,
    compose,
    digital_jacobian_determinants,
    integrate,
    warp,
)

__all__ = ["FIELDS", "PairObjective", "default_loss"]

FIELDS = ("ddf", "inverse_ddf")

_REPAIRS = 16  # each halves the change where it folds: what is left after so many is nothing


class PairObjective:
    """A pair whose field is ``phi(exp(v)(x))``, with the map ``phi`` that was there and a spline ``v``.

    Args:
        values: ``moving``, ``fixed`` and ``ddf``, all of one batch size; ``inverse_ddf``, masks and what else the loss
            takes where there is any.
        loss: of these values and of ``moved``, ``inverse_moved`` and so on; None for :func:`default_loss`.
        spacing: voxels between control points.
        steps: squarings of ``exp(v)``.

    Raises:
        NonFiniteLossError: when the loss is no number to begin with.
    """

    def __init__(self, values: Mapping[str, Any], loss: WeightedLosses | None, spacing: int, steps: int) -> None:
        # Copies, as what an inference mode made cannot be differentiated through.
        self.values = {n: as_float(v).detach().clone() if isinstance(v, Tensor) else v for n, v in values.items()}
        self.start = {name: self.values.pop(name) for name in FIELDS if name in values}
        self.loss_function = default_loss(values) if loss is None else loss.to(self.start["ddf"].device)
        self.spacing, self.steps = spacing, steps
        inputs = [self.loss_function.inputs[n] for n, weight in self.loss_function.weights.items() if weight]
        self.back = any(name.startswith("inverse_") for names in inputs for name in names)
        with torch.no_grad():
            require_finite(*self._terms(self.start), values, 0, "or check the loss of the refinement")
            self._volumes = {name: _folded(field)[0] for name, field in self.start.items()}

    def control_points(self) -> Tensor:
        """Control points (B, d, *s) of no change, in spacings."""
        batch, dims, *size = self.start["ddf"].shape
        return self.start["ddf"].new_zeros(batch, dims, *(math.ceil(n / self.spacing) for n in size))

    def fields(self, points: Tensor, back: bool = True) -> dict[str, Tensor]:
        """The field, and its inverse where there was one and it is wanted, (B, d, *S) each."""
        velocity = bspline_displacement(points, self.spacing, self.start["ddf"].shape[2:])
        found = {"ddf": compose(self.start["ddf"], integrate(velocity, self.steps))}
        if back and "inverse_ddf" in self.start:
            found["inverse_ddf"] = compose(integrate(-velocity, self.steps), self.start["inverse_ddf"])
        return found

    def loss(self, points: Tensor) -> Tensor:
        """What is to become small."""
        return self._terms(self.fields(points, self.back))[0]

    def _terms(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = self.loss_function(PairValues(self.values, fields))
        return total, terms

    def unfolded(self, points: Tensor) -> Tensor:
        """The change, taken back where it folds, until neither field folds more volume than at the start."""
        for _ in range(_REPAIRS):
            fields = self.fields(points)
            folds = [self._new_folds(name, fields) for name in fields]
            marked = [where for where in folds if where is not None]
            if not marked:
                return points
            near = _near(torch.stack(marked).amax(0), self.spacing)
            # What lies beyond the other grid leaves no mark on this one.
            points = points * (1 - 0.5 * near) if bool(near.any()) else points * 0.5
        return torch.zeros_like(points)

    def _new_folds(self, name: str, fields: Mapping[str, Tensor]) -> Tensor | None:
        """Voxels (B, 1, *S) of the fixed grid where a field folds; None if it does no more so than at the start."""
        volume, where = _folded(fields[name])
        if volume <= self._volumes[name]:
            return None
        if name == "ddf":
            return where
        # On the moving grid the fold of an inverse lies where the field leads to; wide enough not to be stepped over.
        return warp(_widened(where, 5), fields["ddf"])


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
    lowest = digital_jacobian_determinants(ddf)
    volume = float(lowest.neg().clamp_min(0).sum(dtype=torch.float64))
    where = (lowest.amin(1, keepdim=True) < 0).float()
    return volume, pad(where, (1, 1) * (ddf.dim() - 2))


def _near(where: Tensor, spacing: int) -> Tensor:
    """How near to a marked voxel control points are, in [0, 1]: (B, 1, *S) to (B, 1, *s)."""
    flat = where.dim() == 4
    blocks = (max_pool2d if flat else max_pool3d)(where, spacing, spacing, ceil_mode=True)
    # A control point reaches two spacings far, and beyond them the change must fade out.
    return (avg_pool2d if flat else avg_pool3d)(_widened(blocks, 5), 3, 1, 1, count_include_pad=False)


def _widened(where: Tensor, width: int) -> Tensor:
    """Mark the neighbours of what is marked too: a box of an odd width."""
    return (max_pool2d if where.dim() == 4 else max_pool3d)(where, width, 1, width // 2)
