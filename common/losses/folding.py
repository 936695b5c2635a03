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
"""The volume that a field folds, as a loss."""

from __future__ import annotations

from torch import Tensor, nn

from common.losses.checks import as_float, check_ddf, full_precision


class NonDiffeomorphicVolume(nn.Module):
    """Non-diffeomorphic volume of a field."""

    def forward(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:
        """The volume; see the class."""
        check_ddf("NonDiffeomorphicVolume", ddf)
        from common.spatial import digital_jacobian_determinants

        with full_precision(ddf.device):
            folded = digital_jacobian_determinants(as_float(ddf)).clamp_max(0).neg()
            return folded.mean()
