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
"""Penalties on the roughness of a displacement field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, check_ddf, check_spacing, full_precision, spacing_for


class Diffusion(nn.Module):
    """Forward-difference diffusion energy."""

    def __init__(
        self, penalty: str = "l2", spacing: Sequence[float] | float | None = None, reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.penalty, self.reduction = penalty, reduction
        self.spacing = check_spacing("Diffusion", spacing)

    def forward(self, ddf: Tensor, weight: Tensor | None = None) -> Tensor:
        """The energy; see the class."""
        dims = check_ddf("Diffusion", ddf)
        spacing = spacing_for("Diffusion", self.spacing, dims)
        with full_precision(ddf.device):
            ddf = as_float(ddf) * ddf.new_tensor(spacing, dtype=as_float(ddf).dtype).view(1, -1, *[1] * dims)
            total = ddf.new_zeros(())
            for axis in range(dims):
                step = ddf.diff(dim=axis + 2) / spacing[axis]
                total = total + (step.abs() if self.penalty == "l1" else step * step).mean() / dims
            return total


class BendingEnergy(nn.Module):
    """Second-difference bending energy."""

    def __init__(self, spacing: Sequence[float] | float | None = None) -> None:
        super().__init__()
        self.spacing = check_spacing("BendingEnergy", spacing)

    def forward(self, ddf: Tensor) -> Tensor:
        """The energy; see the class."""
        dims = check_ddf("BendingEnergy", ddf)
        spacing = spacing_for("BendingEnergy", self.spacing, dims)
        with full_precision(ddf.device):
            ddf = as_float(ddf) * ddf.new_tensor(spacing, dtype=as_float(ddf).dtype).view(1, -1, *[1] * dims)
            total = ddf.new_zeros(())
            for a in range(dims):
                total = total + (ddf.diff(n=2, dim=a + 2) / spacing[a] ** 2).square().mean()
                for b in range(a + 1, dims):
                    mixed = ddf.diff(dim=a + 2).diff(dim=b + 2) / (spacing[a] * spacing[b])
                    total = total + 2 * mixed.square().mean()
            return total


def _unused() -> Tensor:
    return torch.zeros(())
