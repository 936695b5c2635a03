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
"""One step: down the similarity's gradient, corrected by a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.losses.checks import full_precision
from common.spatial import compose, integrate, jacobian_matrix, warp

from .energies import Energy
from .interpolant import value_and_slopes
from .regulariser import Regulariser

__all__ = ["Step"]

# A step size is learned at a tenth of its value: an optimiser that moves every parameter by about its learning rate
# then moves a step size ten times as far.
_SCALE = 10.0
_SQUARINGS = 5


class Step(nn.Module):
    """From a field d to ``d - s·G - R(d, images)``.

    G is the similarity's gradient in d times the number of voxels, s a step size, R a network.

    Args:
        energy: what G is the gradient of; None leaves it out.
        regulariser: R; None leaves it out.
        images: what R sees besides d: "explicit" the fixed and the moved image, "implicit" the fixed and the moving
            image, "none" neither.
        step_size: s before training, in voxels for a gradient of 1.
        learn_step_size: learn it.
        update: "additive" or "diffeomorphic", see :class:`~.network.GraDIRN`.
    """

    def __init__(
        self,
        energy: Energy | None,
        regulariser: Regulariser | None,
        *,
        images: str,
        step_size: float,
        learn_step_size: bool,
        update: str,
    ) -> None:
        super().__init__()
        self.energy, self.regulariser = energy, regulariser
        self.images, self.diffeomorphic = images, update == "diffeomorphic"
        if energy is not None:
            self.tau = nn.Parameter(torch.tensor(step_size / _SCALE), requires_grad=learn_step_size)

    @property
    def step_size(self) -> Tensor:
        """The step size s, a scalar."""
        return _SCALE * self.tau

    def forward(self, ddf: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
        """The next field.

        Args:
            ddf: (B, d, *S), float32 or float64.
            moving: (B, C, *S), of the field's dtype.
            fixed: (B, C, *S), of the field's dtype.

        Returns:
            (B, d, *S).
        """
        with full_precision(ddf.device):
            moved, update = self._descend(ddf, moving, fixed)
        if self.regulariser is not None:
            seen = {"explicit": [ddf, fixed, moved], "implicit": [ddf, fixed, moving], "none": [ddf]}[self.images]
            correction = self.regulariser(torch.cat([tensor for tensor in seen if tensor is not None], dim=1))
            update = -correction.to(ddf.dtype) if update is None else update - correction
        assert update is not None
        return compose(ddf, integrate(update, _SQUARINGS)) if self.diffeomorphic else ddf + update

    def _descend(self, ddf: Tensor, moving: Tensor, fixed: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The moved image, where anything needs it, and ``-s·G``."""
        if self.energy is None:
            return (warp(moving, ddf) if self.images == "explicit" else None), None
        moved, slopes = value_and_slopes(moving, ddf)
        force = self.energy.force(moved, fixed)
        gradient = (force.unsqueeze(2) * slopes).sum(1)
        if self.diffeomorphic:
            # A small motion u before d moves the image by J u, with J the Jacobian matrix of x + d(x).
            gradient = (jacobian_matrix(ddf) * gradient.unsqueeze(2)).sum(1)
        return moved, -self.step_size * gradient
