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
"""Fields and images that several tests use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def _waves(shape: Sequence[int], amplitude: float) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
    turn = 2 * math.pi
    field = [
        torch.sin(turn * axes[(k + 1) % len(shape)] / 17 + k) * torch.cos(turn * axes[k] / 23)
        for k in range(len(shape))
    ]
    return (amplitude * torch.stack(field)).unsqueeze(0)


@pytest.fixture
def smooth_field() -> Callable[[Sequence[int], float], Tensor]:
    """A function of shape and amplitude (voxels) that makes a smooth field (1, d, *shape), float32."""
    return lambda shape, amplitude: _waves(shape, amplitude).float()


@pytest.fixture
def smooth_image() -> Callable[[Sequence[int]], Tensor]:
    """A function of a shape that makes a smooth image (1, 1, *shape) in about [0, 1], float32."""

    def make(shape: Sequence[int]) -> Tensor:
        axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
        return (0.5 + 0.5 * sum(torch.sin(a / (3 + k)) for k, a in enumerate(axes)) / len(shape)).float()[None, None]

    return make
