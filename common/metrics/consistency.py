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
"""How well a field and its inverse undo each other."""

from __future__ import annotations

from torch import Tensor

from common.metrics.base import RegistrationMetric
from common.spatial import compose

__all__ = ["InverseConsistency"]


class InverseConsistency(RegistrationMetric):
    """Mean distance, in voxels, between a voxel and where the inverse field and then the field bring it, per item.

    ``|u21(x) + u12(x + u21(x))|`` over the moving grid, fields taken linearly and held at their border. 0 is best.
    """

    def _compute_tensor(self, ddf: Tensor, inverse_ddf: Tensor) -> Tensor:  # type: ignore[override]
        if ddf.shape[:2] != inverse_ddf.shape[:2]:
            raise ValueError(
                f"ddf and inverse_ddf must both be (B, d, *S), got {tuple(ddf.shape)} and {tuple(inverse_ddf.shape)}"
            )
        return compose(ddf, inverse_ddf).norm(dim=1).flatten(1).mean(1, keepdim=True).float()
