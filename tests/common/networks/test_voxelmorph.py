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

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from common.networks import VoxelMorph, VoxelMorphEncoder, VoxelMorphUNet
from common.spatial import integrate


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("encoder", "decoder", "count"),
    [
        ((16, 32, 32, 32), (32, 32, 32, 32, 32, 16, 16), 301_411),
        ((16, 32, 64, 96), (128, 128, 96, 64, 32, 32, 32), 1_955_091),
        ((16, 32, 64, 128), (256, 256, 128, 64, 32, 32, 32), 4_747_859),
        ((32, 64, 128, 256), (320, 320, 256, 128, 64, 64, 64), 11_347_747),
    ],
)
def test_parameters_of_the_published_sizes(encoder: Sequence[int], decoder: Sequence[int], count: int) -> None:
    assert _count(VoxelMorph(3, encoder_channels=encoder, decoder_channels=decoder)) == count


@pytest.mark.parametrize("size", [(32, 32), (19, 45), (16, 17, 20)])
@pytest.mark.parametrize("half_resolution", [False, True])
def test_any_size_runs_and_learns(size: Sequence[int], half_resolution: bool, device: torch.device) -> None:
    network = VoxelMorph(len(size), half_resolution=half_resolution).to(device)
    out = network.fields(torch.rand(2, 2, *size, device=device))
    assert out["ddf"].shape == out["velocity"].shape == (2, len(size), *size)
    (out["ddf"] ** 2).sum().backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_without_integration_the_output_is_the_flow() -> None:
    network = VoxelMorph(2, integration_steps=0)
    image = torch.rand(1, 2, 32, 32)
    out = network.fields(image)
    assert set(out) == {"ddf"}
    torch.testing.assert_close(out["ddf"], network.head(network.unet(image)))
    torch.testing.assert_close(network(image), out["ddf"])


class _Wave(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        position = torch.arange(features.shape[2], dtype=torch.float32)
        field = torch.zeros(1, 2, *features.shape[2:])
        field[:, 0] = 3 * torch.sin(2 * torch.pi * position / 32).view(-1, 1)
        return field


def test_half_resolution_integrates_the_same_velocity() -> None:
    """The wave on which the reverse scaling (halve up, double down) is wrong by 1.1 voxels."""
    network = VoxelMorph(2, half_resolution=True)
    network.head = _Wave()
    out = network.fields(torch.rand(1, 2, 64, 64))
    full = integrate(out["velocity"], 7)
    assert full.abs().max() > 2.5
    assert (out["ddf"] - full).abs()[..., 4:-4, 4:-4].max() < 0.2


def test_the_encoder_is_the_down_arm() -> None:
    encoder = VoxelMorphEncoder()
    maps = encoder(torch.rand(1, 2, 32, 16, 48))
    assert [m.shape[1] for m in maps] == [16, 32, 32, 32] == list(encoder.feature_channels)
    assert [m.shape[2] for m in maps] == [16, 8, 4, 2]
    unet = VoxelMorphUNet()
    unet.encoder.load_state_dict(encoder.state_dict())


def test_a_decoder_without_full_resolution_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 4 numbers"):
        VoxelMorphUNet(decoder_channels=(8, 8, 8, 8))


def test_the_field_is_float32_under_autocast(device: torch.device) -> None:
    network = VoxelMorph(2).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = network.fields(torch.rand(1, 2, 32, 32, device=device))
    assert {field.dtype for field in out.values()} == {torch.float32}
