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
from typing import Any

import pytest
import torch
from torch import nn

from bundles.ssl_pretrain.scripts.ssl_head import SSLHead
from bundles.ssl_pretrain.scripts.ssl_network import SSLRegistration
from common.networks import SwinEncoder, VFAEncoder, VoxelMorphEncoder, build_encoder
from common.spatial import warp

_TINY: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 2), "window_size": 2, "drop_path": 0.0},
    "vfa": {"start_channels": 2, "max_channels": 8, "downsamples": 3},
    "dual_stream": {"channels": (4, 4, 8, 8)},
    "voxelmorph": {"channels": (8, 8, 8)},
}


def _network(name: str = "swin", dims: int = 2, **options: Any) -> SSLRegistration:
    return SSLRegistration(name, dims, encoder_options=_TINY[name], **options)


def test_parameters_of_the_published_head() -> None:
    assert sum(p.numel() for p in SSLHead(SwinEncoder()).parameters()) == 321_528


@pytest.mark.parametrize("name", sorted(_TINY))
@pytest.mark.parametrize("size", [(32, 48), (37, 21), (16, 18, 33)])
def test_any_encoder_and_any_size_run_and_learn(name: str, size: Sequence[int], device: torch.device) -> None:
    network = _network(name, len(size)).to(device)
    out = network.fields(torch.rand(2, 2, *size, device=device))
    assert out["ddf"].shape == (2, len(size), *size)
    assert out["ddf"].dtype == torch.float32
    levels = [*out["level_mean"], *out["level_logvar"], out["ensemble_mean"], out["ensemble_logvar"]]
    assert len(levels) == 2 * len(network.encoder.strides) + 2
    assert len({level.shape for level in levels}) == 1
    ((out["ddf"] ** 2).sum() + sum(level.cos().sum() for level in levels)).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize(("encoder", "stride"), [(SwinEncoder(2), 2), (VoxelMorphEncoder(2), 1), (VFAEncoder(2), 1)])
def test_levels_meet_at_twice_the_finest_map(encoder: Any, stride: int) -> None:
    out = SSLRegistration(encoder, downsample=1).fields(torch.rand(1, 2, 32, 64))
    assert out["ensemble_mean"].shape == (1, 2, 32 // stride, 64 // stride)


def test_the_published_factors() -> None:
    """Head at a quarter of the image: patch 4 on the half-size pair, twice the finest map."""
    encoder = build_encoder("swin", 2, patch_size=4, **_TINY["swin"])
    out = SSLRegistration(encoder).fields(torch.rand(1, 2, 64, 96))
    assert out["ensemble_mean"].shape[2:] == (16, 24)


def test_displacements_are_image_voxels() -> None:
    encoder = build_encoder("swin", 2, patch_size=4, **_TINY["swin"])
    network = SSLRegistration(encoder).eval()
    nn.init.zeros_(network.head.ensemble.mean.conv.weight)
    network.head.ensemble.mean.conv.bias.data.copy_(torch.tensor([0.5, -1.0]))
    ddf = network(torch.rand(1, 2, 40, 40))
    torch.testing.assert_close(ddf[:, 0], torch.full((1, 40, 40), 2.0))
    torch.testing.assert_close(ddf[:, 1], torch.full((1, 40, 40), -4.0))


def test_the_field_is_a_sample_in_training_and_the_mean_otherwise() -> None:
    encoder = build_encoder("voxelmorph", 2, **_TINY["voxelmorph"])
    network = SSLRegistration(encoder, downsample=1)
    nn.init.constant_(network.head.ensemble.logvar.conv.bias, 2 * torch.log(torch.tensor(3.0)).item())
    image = torch.rand(1, 2, 64, 64)
    sample, again = network(image), network(image)
    mean = network.eval()(image)
    torch.testing.assert_close(network(image), mean)
    assert (sample - again).abs().max() > 1
    # A standard deviation of three, at which the variance would be nine and a log-deviation would make it e^2.2.
    assert (sample - mean).std().item() == pytest.approx(3.0, rel=0.05)


def test_evaluation_leaves_the_random_state_alone() -> None:
    network = _network().eval()
    before = torch.get_rng_state()
    network(torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(before, torch.get_rng_state())


def test_it_starts_near_the_identity_with_little_variance() -> None:
    out = _network().eval().fields(torch.rand(1, 2, 32, 32))
    assert out["ddf"].abs().max() < 0.05
    torch.testing.assert_close(out["ensemble_logvar"], torch.full_like(out["ensemble_logvar"], -10.0))


def test_fields_stay_float32_under_autocast(device: torch.device) -> None:
    network = _network().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = network.fields(torch.rand(1, 2, 32, 32, device=device).to(torch.bfloat16))
    assert {v.dtype for v in (out["ddf"], out["ensemble_mean"], *out["level_logvar"])} == {torch.float32}


def test_a_checkpoint_serves_every_size(tmp_path: Any) -> None:
    source, target = _network().eval(), _network().eval()
    source(torch.rand(1, 2, 64, 32))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target(torch.rand(1, 2, 23, 40))
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    image = torch.rand(1, 2, 30, 30)
    torch.testing.assert_close(source(image), target(image))


def test_options_for_a_built_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['embed_dim'\] have no effect"):
        SSLRegistration(SwinEncoder(2), encoder_options={"embed_dim": 8})


@pytest.mark.parametrize("name", sorted(_TINY))
def test_it_learns_to_register_a_pair(name: str, blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    network = _network(name, downsample=1)
    moving, fixed = blobs
    image = torch.cat((moving, fixed), dim=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = ((moving - fixed) ** 2).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        ddf = network(image)
        (((warp(moving, ddf) - fixed) ** 2).mean() + 1e-4 * (ddf.diff(dim=2) ** 2).mean()).backward()
        optimizer.step()
    ddf = network.eval()(image)
    assert ((warp(moving, ddf) - fixed) ** 2).mean().item() < 0.2 * before
    # The blob lies at (12, 18) in the moving image and at (16, 15) in the fixed one.
    torch.testing.assert_close(ddf[0, :, 16, 15], torch.tensor([-4.0, 3.0]), atol=1.5, rtol=0)
