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
"""Numbers that are known already: what a network or the engine says of its own work."""

from __future__ import annotations

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric, nan_mean

__all__ = ["Reported"]


class Reported(RegistrationMetric):
    """A number for each item, taken as it is; of several numbers their mean.

    For what is found while a pair is registered, such as the seconds it took or the iterations of a solver, so that it
    stands in the same table as the measures.
    """

    def _compute_tensor(self, values: Tensor) -> Tensor:  # type: ignore[override]
        if values.ndim == 0:
            raise ValueError("expected one or more numbers an item, (B, ...), got a single number")
        return nan_mean(values.reshape(len(values), -1).to(torch.float32), 1)[:, None]
