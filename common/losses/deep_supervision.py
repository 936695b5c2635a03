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
"""The loss of the fields that a pyramid passes on its way to the last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.spatial import warp

__all__ = ["DeepSupervision"]


class DeepSupervision(nn.Module):
    """Similarity and smoothness of every field of a pyramid but the last, which the main terms already judge.

    ``sum_k decay^k (similarity(warp(moving, u_k), fixed) + weight * smoothness(u_k))``, where k = 1 is the last field
    but one.

    Args:
        similarity: a loss of (moved, fixed).
        smoothness: a loss of a field, or None.
        smoothness_weight: of the smoothness against the similarity.
        decay: how much less a level counts than the next finer one.

    Raises:
        ValueError: when the decay is not in (0, 1].
    """

    def __init__(
        self,
        similarity: nn.Module,
        smoothness: nn.Module | None = None,
        smoothness_weight: float = 1.0,
        decay: float = 0.5,
    ) -> None:
        super().__init__()
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        self.similarity, self.smoothness = similarity, smoothness
        self.smoothness_weight, self.decay = smoothness_weight, decay

    def forward(self, moving: Tensor, fixed: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Loss of a pyramid.

        Args:
            moving: (B, C, *S).
            fixed: (B, C, *S).
            pyramid: fields (B, d, *S) on the image grid, coarse to fine; the last one is left out.

        Returns:
            a scalar; 0 for a pyramid of one field.
        """
        total = torch.zeros((), device=moving.device)
        for depth, field in enumerate(reversed(pyramid[:-1]), start=1):
            loss = self.similarity(warp(moving, field), fixed)
            if self.smoothness is not None:
                loss = loss + self.smoothness_weight * self.smoothness(field)
            total = total + self.decay**depth * loss
        return total
