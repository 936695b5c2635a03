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

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.dual_stream_pyramid.scripts.sitreg import SITReg, SITRegEncoder, SITRegHead
from common.spatial import compose, digital_jacobian_determinants

SMALL: dict[str, Any] = {"channels": (4, 8, 8), "head_channels": (4, 8, 12)}


def exchanged(image: Tensor) -> Tensor:
    return torch.cat(image.chunk(2, dim=1)[::-1], dim=1)


def test_published_number_of_parameters_and_bounds() -> None:
    network = SITReg()
    assert sum(p.numel() for p in network.encoder.parameters()) == 3_332_928
    assert sum(p.numel() for p in network.decoder.parameters()) == 11_743_182
    published = [
        0.36, 0.3854469526363808, 0.39803114051999844, 0.4007250760586097, 0.40175329749498856, 0.40253633025170044,
    ]  # fmt: skip
    assert network.decoder.bounds == pytest.approx([0.99 * bound for bound in published], rel=1e-9)
    assert network.decoder.strides == (1, 2, 4, 8, 16, 32)


def test_encoder_by_the_book() -> None:
    encoder = SITRegEncoder(3, 2, (4, 8, 12), groups=2)
    w = dict(encoder.named_parameters())
    for parameter in w.values():
        parameter.data.normal_()

    def unit(x: Tensor, name: str) -> Tensor:
        x = F.conv3d(x, w[f"{name}.conv.weight"], w[f"{name}.conv.bias"], padding=1)
        grouped = x.unflatten(1, (2, -1)).flatten(2)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
        x = ((grouped - mean) / (variance + 1e-5).sqrt()).view(x.shape)
        shape = (1, -1, 1, 1, 1)
        return (x * w[f"{name}.norm.weight"].view(shape) + w[f"{name}.norm.bias"].view(shape)).clamp_min(0)

    image = torch.randn(2, 2, 8, 4, 4)
    skip = F.conv3d(image, w["projection.weight"], w["projection.bias"])
    expected = [unit(unit(skip, "units.0"), "units.1")]
    for stage in ("stages.0", "stages.1"):
        pooled = F.conv3d(F.avg_pool3d(skip, 2), w[f"{stage}.projection.weight"], w[f"{stage}.projection.bias"])
        skip = F.conv3d(expected[-1], w[f"{stage}.down.weight"], w[f"{stage}.down.bias"], stride=2) + pooled
        expected.append(unit(unit(skip, f"{stage}.units.0"), f"{stage}.units.1"))
    for found, level in zip(encoder(image), expected, strict=True):
        torch.testing.assert_close(found, level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("limit", [2**20, 0])
@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
def test_a_head_sees_either_side(shape: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bundles.dual_stream_pyramid.scripts.sitreg._LARGE", limit)
    head = SITRegHead(len(shape), 12, 8)
    a, b = torch.randn(2, 3, 6, *shape)
    with torch.no_grad():
        sides = [head.flow(head.units(torch.cat((d, a + b), dim=1))) for d in (a - b, b - a)]
        found, other = head.both(a + b, a - b), head.both(a + b, b - a)
    torch.testing.assert_close(found, torch.cat(sides), rtol=1e-4, atol=1e-5)
    assert torch.equal(other, torch.cat(found.chunk(2)[::-1]))


@pytest.mark.parametrize("size", [(21, 10), (9, 8, 11)])
def test_any_size_both_ways_to_the_bit(size: tuple[int, ...], device: torch.device) -> None:
    network = SITReg(len(size), pyramid=True, **SMALL).to(device)
    image = torch.rand(2, 2, *size, device=device)
    found, other = network.fields(image), network.fields(exchanged(image))
    assert found["ddf"].shape == found["inverse_ddf"].shape == (2, len(size), *size)
    assert found["ddf"].dtype == torch.float32 and float(found["ddf"].detach().abs().max()) > 0.1
    assert torch.equal(found["ddf"], other["inverse_ddf"]) and torch.equal(found["inverse_ddf"], other["ddf"])
    assert found["inversion_iterations"].shape == found["inversion_residual"].shape == (2, 2, 3)
    for name in ("pyramid", "inverse_pyramid"):
        assert [stage.shape for stage in found[name]] == [found["ddf"].shape] * 3
    assert torch.equal(found["pyramid"][-1], found["ddf"])
    assert "pyramid" not in SITReg(len(size), **SMALL).to(device).fields(image)


def test_all_six_levels_on_an_image_that_divides_by_nothing() -> None:
    network = SITReg(2, channels=(4, 4, 8, 8, 8, 8), head_channels=(4, 4, 8, 8, 8, 8))
    with torch.no_grad():
        found = network.fields(torch.rand(1, 2, 37, 50))
        assert torch.equal(network(torch.rand(1, 2, 5, 3)).isfinite(), torch.ones(1, 2, 5, 3, dtype=torch.bool))
    assert found["ddf"].shape == (1, 2, 37, 50)
    assert float(compose(found["ddf"], found["inverse_ddf"])[..., 8:-8, 8:-8].abs().mean()) < 0.1
    assert float(digital_jacobian_determinants(found["ddf"]).min()) > 0


def test_gradients_reach_every_weight_and_checkpoints_change_none() -> None:
    gradients = []
    for checkpoint_heads in (False, True):
        torch.manual_seed(0)
        network = SITReg(2, **SMALL, decoder_options={"checkpoint_heads": checkpoint_heads})
        found = network.fields(torch.rand(1, 2, 12, 10))
        (found["ddf"].square().mean() + found["inverse_ddf"].sum()).backward()
        assert all(float(p.grad.abs().max()) > 0 for p in network.parameters() if p.grad is not None and p.ndim > 1)
        gradients.append([p.grad for p in network.parameters()])
    assert None not in gradients[0]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_autocast_keeps_fields_in_float32() -> None:
    network, image = SITReg(2, **SMALL), torch.rand(1, 2, 12, 10)
    plain = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.fields(image)
    assert found["ddf"].dtype == found["inverse_ddf"].dtype == torch.float32
    torch.testing.assert_close(found["ddf"], plain, rtol=0, atol=0.1)


def test_bad_channels() -> None:
    with pytest.raises(ValueError, match="multiple of the 4 groups, got 6"):
        SITReg(2, channels=(4, 6), head_channels=(4, 4))
    with pytest.raises(ValueError, match="one number a level"):
        SITReg(2, channels=(4, 8), head_channels=(4,))
