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

import torch

from common.networks import VFAEncoder


def test_parameters_channels_and_strides_of_the_published_encoder() -> None:
    encoder = VFAEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 1_720_882
    assert encoder.feature_channels == (16, 32, 64, 64, 64)
    assert encoder.strides == (1, 2, 4, 8, 16)
    assert encoder.pairing == "separate"


def test_maps_have_the_declared_sizes(device: torch.device) -> None:
    encoder = VFAEncoder(start_channels=2, max_channels=8).to(device)
    maps = encoder(torch.rand(2, 1, 16, 32, 16, device=device))
    for level, channels, stride in zip(maps, encoder.feature_channels, encoder.strides, strict=True):
        assert level.shape == (2, channels, 16 // stride, 32 // stride, 16 // stride)


def test_odd_sizes_run() -> None:
    assert VFAEncoder(2)(torch.rand(1, 1, 35, 50))[0].shape == (1, 16, 35, 50)


def test_brightness_and_contrast_of_an_image_do_not_matter() -> None:
    encoder = VFAEncoder(2)
    image = torch.rand(1, 1, 32, 32)
    for a, b in zip(encoder(image), encoder(5 * image - 2), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_every_parameter_learns() -> None:
    encoder = VFAEncoder(2)
    sum(level.cos().sum() for level in encoder(torch.rand(1, 1, 32, 32))).backward()
    # A bias before an instance norm is taken away again, up to rounding: its gradient is there, and next to nothing.
    assert all(p.grad is not None for p in encoder.parameters())
    weights = {n: p for n, p in encoder.named_parameters() if not n.endswith("conv.bias")}
    assert all(p.grad.abs().sum() > 0 for p in weights.values())
