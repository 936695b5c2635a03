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
"""Sums over boxes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bundles.similarity_learning.scripts.boxes import Box
from bundles.similarity_learning.scripts.encoder import replicate


@pytest.mark.parametrize("size", [(9, 8), (1, 4), (5, 7, 6)])
@pytest.mark.parametrize("half_width", [0, 1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_and_their_reverse(size: tuple[int, ...], half_width: int, weighted: bool) -> None:
    axes = len(size)
    weights = torch.rand(1, 1, *(2 * half_width + 1,) * axes, dtype=torch.float64)
    box = Box(half_width, weights if weighted else None)
    maps = torch.randn(3, 1, *size, dtype=torch.float64).requires_grad_()
    convolve = F.conv2d if axes == 2 else F.conv3d
    expected = convolve(replicate(maps, half_width), weights if weighted else torch.ones_like(weights))
    torch.testing.assert_close(box.sum(maps), expected)
    gradient = torch.randn_like(expected)
    (slope,) = torch.autograd.grad(expected, maps, gradient)
    torch.testing.assert_close(box.reverse(gradient), slope)
    torch.testing.assert_close(torch.autograd.grad(box.sum(maps), maps, gradient)[0], slope)


def test_weights_can_be_learnt() -> None:
    weights = torch.rand(1, 1, 3, 3, dtype=torch.float64).requires_grad_()
    maps = torch.rand(2, 1, 5, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, x: Box(1, w).sum(x), (weights, maps))
