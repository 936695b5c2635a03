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
from __future__ import annotations

import pytest
import torch

from common.networks import DualStreamEncoder


def test_published_size_of_the_encoder() -> None:
    assert sum(p.numel() for p in DualStreamEncoder().parameters()) == 507_504


@pytest.mark.parametrize("size", [(16, 32), (19, 21), (16, 16, 32)])
def test_every_level_halves_the_one_before(size: tuple[int, ...], device: torch.device) -> None:
    encoder = DualStreamEncoder(len(size)).to(device)
    features = encoder(torch.rand(2, 1, *size, device=device))
    for level, channels, stride in zip(features, encoder.feature_channels, encoder.strides, strict=True):
        assert level.shape == (2, channels, *(-(-n // stride) for n in size))


def test_convolutions_start_with_the_gain_of_a_leaky_relu_and_without_bias() -> None:
    block = DualStreamEncoder().blocks[4]
    assert block.conv2.weight.std().item() == pytest.approx((2 / (1.04 * 64 * 27)) ** 0.5, rel=0.02)
    assert block.skip.bias.abs().max() == 0
