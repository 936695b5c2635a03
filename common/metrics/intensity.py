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
"""How far two images are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric

__all__ = ["RootMeanSquareError"]


class RootMeanSquareError(RegistrationMetric):
    """Root of the mean squared difference of two images, per item, in the images' own unit."""

    def _compute_tensor(  # type: ignore[override]
        self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        if moved.shape != fixed.shape:
            raise ValueError(f"both images must have one shape, got {tuple(moved.shape)} and {tuple(fixed.shape)}")
        squares = (moved.double() - fixed.double()).square()
        if mask is None:
            return squares.flatten(1).mean(1, keepdim=True).sqrt().float()
        inside = (mask > 0).expand_as(squares)
        total = torch.where(inside, squares, 0.0).flatten(1).sum(1, keepdim=True)
        return (total / inside.flatten(1).sum(1, keepdim=True)).sqrt().float()
