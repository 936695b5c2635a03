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
"""A similarity loss, read as a score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.metrics.base import RegistrationMetric

__all__ = ["Similarity"]


class Similarity(RegistrationMetric):
    """The negative of a similarity loss, per item, so that more is better.

    Args:
        loss: a loss of two images (B, C, *S), such as ``common.losses.LNCC()``, whose score is then in [0, 1].
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def _compute_tensor(self, image: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        items = zip(image.split(1), target.split(1), strict=True)
        return -torch.stack([self.loss(one, other) for one, other in items])[:, None]
