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
"""How far a field is from the true one, where that is known."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric, per_item_spacing

__all__ = ["EndpointError"]


class EndpointError(RegistrationMetric):
    """Mean distance between where a field and the true field send each voxel, per item.

    Args:
        spacing: mm per axis, for a distance in mm; voxels without it.
    """

    def __init__(self, spacing: float | tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.spacing = spacing

    def _compute_tensor(self, ddf: Tensor, true_ddf: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if ddf.shape != true_ddf.shape:
            raise ValueError(
                f"both fields must have the same shape, got {tuple(ddf.shape)} and {tuple(true_ddf.shape)}"
            )
        batch, dims = ddf.shape[:2]
        scale = torch.tensor(per_item_spacing(self.spacing, batch, dims), device=ddf.device)
        difference = (ddf - true_ddf).float() * scale.float().view(batch, dims, *[1] * dims)
        distance = difference.norm(dim=1).flatten(1)
        if mask is None:
            return distance.mean(1, keepdim=True)
        inside = (mask[:, 0] > 0).flatten(1)
        return ((distance * inside).sum(1) / inside.sum(1))[:, None]
