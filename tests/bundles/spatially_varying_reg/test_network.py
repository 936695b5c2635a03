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
from torch import Tensor, nn

from bundles.spatially_varying_reg.scripts.hyperpriors import BetaHyperprior, SpatiallyWeightedDiffusion
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR, WeightHead
from common.spatial import compose, warp

_TINY: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 1), "num_heads": (2, 2, 2), "steps": 2}


def _network(dims: int = 2, **options: Any) -> TransMorphSPR:
    return TransMorphSPR(dims, **{**_TINY, **options})


def _moving_heads(network: TransMorphSPR) -> TransMorphSPR:
    """Flow heads as large as other layers, so that the fields are not near zero."""
    for step in network.time_steps.steps:
        nn.init.normal_(step.head.conv.weight, std=0.1)
    return network


@pytest.mark.parametrize("size", [(32, 48), (37, 21), (3, 70), (16, 18, 33), (9, 7, 5)])
@pytest.mark.parametrize("options", [{}, {"update": "self_warped", "norm": "batch"}])
def test_any_size_and_every_field(size: Sequence[int], options: dict[str, Any], device: torch.device) -> None:
    network = _network(len(size), inverse=True, **options).to(device)
    out = network.fields(torch.rand(2, 2, *size, device=device))
    velocity = {"velocity"} if options else set()
    assert set(out) == {"ddf", "weight_map", "inverse_ddf"} | velocity
    for name, field in out.items():
        assert field.shape == (2, 1 if name == "weight_map" else len(size), *size)
        assert field.dtype == torch.float32
    assert out["weight_map"].min() >= 1e-6 and out["weight_map"].max() <= 1
    assert out["ddf"].abs().max() < 0.05  # near the identity before training


def test_the_field_alone_asks_no_weight_head_and_no_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _moving_heads(_network(inverse=True)).eval()
    image = torch.rand(1, 2, 37, 21)
    expected = network.fields(image)["ddf"]

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("asked for")

    monkeypatch.setattr(WeightHead, "forward", refuse)
    monkeypatch.setattr(type(network.time_steps), "_retreat", refuse)
    torch.testing.assert_close(network(image), expected)
    for name in ("weight_map", "inverse"):
        with pytest.raises(AssertionError, match="asked for"):
            network.fields(image)
        setattr(network, name, False)
    assert set(network.fields(image)) == {"ddf"}


def test_a_network_built_without_weight_map_has_no_head_for_one() -> None:
    network = _network(weight_map=False)
    assert not [name for name in network.state_dict() if name.startswith("weight_head")]
    assert set(network.fields(torch.rand(1, 2, 32, 32))) == {"ddf"}
    network.weight_map = True
    with pytest.raises(ValueError, match="built with weight_map=False"):
        network.fields(torch.rand(1, 2, 32, 32))


class _Smooth(nn.Module):
    """A flow head that answers with a smooth field, whatever it sees."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, features: Tensor) -> Tensor:
        size, dims = features.shape[2:], features.ndim - 2
        coarse = 1.5 * torch.randn(1, dims, *(3,) * dims, generator=torch.Generator().manual_seed(self.seed))
        fine = nn.functional.interpolate(coarse, size, mode="bilinear" if dims == 2 else "trilinear")
        pool = nn.functional.avg_pool2d if dims == 2 else nn.functional.avg_pool3d
        return pool(fine, 5, 1, 2, count_include_pad=False)


@pytest.mark.parametrize("update", ["composition", "addition", "self_warped"])
@pytest.mark.parametrize("size", [(64, 64), (48, 48, 48)])
def test_the_inverse_undoes_the_field(update: str, size: tuple[int, ...]) -> None:
    network = _network(len(size), update=update, inverse=True, padding="border").eval()
    for seed, step in enumerate(network.time_steps.steps):
        step.head = _Smooth(seed)
    with torch.no_grad():
        out = network.fields(torch.rand(1, 2, *size))
    ddf, inverse = out["ddf"], out["inverse_ddf"]
    inside = (..., *(slice(12, -12) for _ in size))  # from farther out one comes from beyond the border
    assert ddf[inside].abs().max() > 4
    for outer, inner in ((ddf, inverse), (inverse, ddf)):
        assert compose(outer, inner)[inside].abs().max() < 0.15


def test_logits_or_weights_are_interpolated() -> None:
    head = WeightHead(2, 3, 4, norm="instance", upsample="logit").eval()
    features = torch.randn(1, 3, 5, 6) * 3
    with torch.no_grad():
        coarse, fine = head(features, (5, 6)), head(features, (10, 12))
        head.upsample = "prob"
        mixed = head(features, (10, 12))
        torch.testing.assert_close(head(features, (5, 6)), coarse)
    resize = nn.functional.interpolate
    torch.testing.assert_close(mixed, resize(coarse, (10, 12), mode="bilinear"))
    torch.testing.assert_close(fine, resize(coarse.logit(), (10, 12), mode="bilinear").sigmoid())
    assert (fine - mixed).abs().max() > 1e-4


@pytest.mark.parametrize("upsample", ["logit", "prob"])
def test_weights_keep_off_zero_where_logits_are_far_out(upsample: str) -> None:
    head = WeightHead(2, 3, 4, norm="instance", upsample=upsample)
    nn.init.zeros_(head.last.weight)
    for bias, expected in ((-1000.0, 1e-6), (1000.0, 1.0), (0.0, 0.5)):
        nn.init.constant_(head.last.bias, bias)
        assert head(torch.rand(1, 3, 4, 4), (8, 8)).flatten().tolist() == pytest.approx([expected] * 64)


@pytest.mark.parametrize("downsample", [1, 2, (2, 2, 1), (1, 2, 4)])
def test_pooling_one_factor_an_axis(downsample: int | tuple[int, ...]) -> None:
    out = _network(3, downsample=downsample).fields(torch.rand(1, 2, 20, 17, 6))
    assert out["ddf"].shape == (1, 3, 20, 17, 6)
    assert out["weight_map"].shape == (1, 1, 20, 17, 6)


def test_two_channels_an_image() -> None:
    out = _network(channels=2).fields(torch.rand(1, 4, 32, 32))
    assert out["ddf"].shape == (1, 2, 32, 32)


@pytest.mark.parametrize("dims", [2, 3])
def test_half_precision_keeps_fields_and_weights_exact(dims: int, device: torch.device) -> None:
    network = _moving_heads(_network(dims, inverse=True, update="addition")).to(device).eval()
    image = torch.rand(1, 2, *(33,) * dims, device=device)
    with torch.no_grad():
        exact = network.fields(image)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            rough = network.fields(image)
    for name, field in exact.items():
        assert rough[name].dtype == torch.float32
        assert (rough[name] - field).abs().mean() < 0.1 * field.std()
    # Not rounded to the eight bits of the format.
    assert not torch.equal(rough["weight_map"], rough["weight_map"].bfloat16().float())


def _loss(network: TransMorphSPR, image: Tensor) -> Tensor:
    out = network.fields(image)
    moving, fixed = image.chunk(2, dim=1)
    similarity = (warp(moving, out["ddf"], padding="zeros") - fixed).square().mean()
    loss = similarity + BetaHyperprior(1.175)(out["weight_map"])
    return loss + SpatiallyWeightedDiffusion(3.35)(out["ddf"], out["weight_map"])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", [{}, {"norm": "batch", "update": "self_warped"}, {"diffeomorphic": False}])
def test_the_loss_reaches_every_parameter(dims: int, options: dict[str, Any], device: torch.device) -> None:
    network = _moving_heads(_network(dims, drop_path=0.0, **options)).to(device)
    _loss(network, torch.rand(1, 2, *(40,) * dims, device=device)).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_it_learns_both_the_field_and_the_weights(blobs: tuple[Tensor, Tensor]) -> None:
    network = _network(drop_path=0.0)
    moving, fixed = blobs
    image = torch.cat((moving, fixed), dim=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = ((moving - fixed) ** 2).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        out = network.fields(image)
        similarity = ((warp(moving, out["ddf"]) - fixed) ** 2).mean()
        prior = BetaHyperprior(1.175)(out["weight_map"])
        (similarity + 0.01 * (prior + SpatiallyWeightedDiffusion(0.1)(out["ddf"], out["weight_map"]))).backward()
        optimizer.step()
    assert ((warp(moving, network(image)) - fixed) ** 2).mean().item() < 0.2 * before
    # Nothing but the smoothness of the field speaks against a weight of one.
    assert network.fields(image)["weight_map"].mean() > 0.9


def test_checkpointing_changes_nothing() -> None:
    plain, frugal = _network(drop_path=0.0), _network(drop_path=0.0, use_checkpoint=True)
    frugal.load_state_dict(plain.state_dict())
    image = torch.rand(1, 2, 32, 32)
    for network in (plain, frugal):
        _loss(network, image).backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_checkpoint_serves_every_size(tmp_path: Any) -> None:
    source, target = _moving_heads(_network(3)).eval(), _network(3).eval()
    before = {name: tensor.shape for name, tensor in source.state_dict().items()}
    source.fields(torch.rand(1, 2, 40, 24, 33))
    assert {name: tensor.shape for name, tensor in source.state_dict().items()} == before
    assert set(before) == {name for name, _ in source.named_parameters()}  # no buffers at all
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target(torch.rand(1, 2, 16, 16, 20))
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    image = torch.rand(1, 2, 18, 30, 20)
    with torch.no_grad():
        torch.testing.assert_close(source(image), target(image))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'bits'"):
        _network(weight_upsample="bits")
    with pytest.raises(ValueError, match="norm must be"):
        _network(norm="group")
    with pytest.raises(ValueError, match="update must be one of"):
        _network(update="sum")
    with pytest.raises(ValueError, match="downsample"):
        _network(downsample=(2, 2, 2))
    with pytest.raises(ValueError, match="a 2-D network takes"):
        _network().fields(torch.rand(1, 2, 8, 8, 8))
    with pytest.raises(ValueError, match="inverse needs diffeomorphic=True"):
        _network(inverse=True, diffeomorphic=False).fields(torch.rand(1, 2, 16, 16))
