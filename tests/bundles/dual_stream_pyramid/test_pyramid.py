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

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bundles.dual_stream_pyramid.scripts import pyramid
from bundles.dual_stream_pyramid.scripts.pyramid import DECODERS, DualStreamPyramid
from common.networks import FlowHead, VoxelMorphEncoder

_COUNTS = {
    "conv_mf": 2_854_079,
    "conv_mfc": 3_168_575,
    "conv_c": 1_993_023,
    "convic_mf": 2_854_079,
    "convic_c": 2_307_519,
    "vfa": 791_104,
}
_PLAIN = ["conv_mf", "conv_mfc", "conv_c", "vfa"]
_SMALL = {"encoder_channels": (4, 8, 8), "decoder_channels": (8, 8, 8)}


def _network(dims: int, decoder: str, **options: object) -> DualStreamPyramid:
    """A small network that moves: heads that start at zero would hide much."""
    network = DualStreamPyramid(dims, decoder, **{**_SMALL, **options})
    for module in network.modules():
        if isinstance(module, FlowHead):
            nn.init.normal_(module.conv.weight, std=0.05)
    return network


def test_every_decoder_has_a_published_size() -> None:
    assert set(DECODERS) == set(_COUNTS)


@pytest.mark.parametrize(("decoder", "count"), list(_COUNTS.items()))
def test_published_sizes(decoder: str, count: int) -> None:
    assert sum(p.numel() for p in DualStreamPyramid(3, decoder).parameters()) == count


def _canonical_weight(number: int, kind: str, shape: Sequence[int]) -> torch.Tensor:
    z = np.random.RandomState(10000 + number).standard_normal(shape)
    value = {
        "conv.weight": z * (2 / (1.04 * np.prod(shape[1:]))) ** 0.5,
        "flow.weight": 0.004 * z,
        "norm.weight": 1 + 0.1 * z,
        "norm.bias": 0.1 * z,
    }.get(kind, 0.05 * z)
    return torch.from_numpy(value).float()


def test_parity_of_the_field(shared: Path) -> None:
    folder = shared / "parity/dual_stream_pyramid"
    order = json.loads((folder / "canonical_parameter_order.json").read_text())["DP-Conv-MFC"]
    arrays = {k: torch.from_numpy(v) for k, v in np.load(folder / "DP-Conv-MFC_32x48x32.npz").items()}
    network = DualStreamPyramid(3, "conv_mfc")
    parameters = list(network.encoder.parameters())
    parameters += [p for step in reversed(network.decoder.steps) for p in step.parameters()]
    with torch.no_grad():
        for parameter, (number, _, kind, shape) in zip(parameters, order, strict=True):
            assert list(parameter.shape) == shape
            parameter.copy_(_canonical_weight(number, kind, shape))
        ddf = network(torch.cat((arrays["moving"], arrays["fixed"]), dim=1))
    torch.testing.assert_close(ddf, arrays["disp"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("size", [(16, 12), (7, 13), (6, 9, 8)])
def test_any_size_runs_and_learns(decoder: str, size: Sequence[int], device: torch.device) -> None:
    network = _network(len(size), decoder).to(device)
    found = network.fields(torch.rand(2, 2, *size, device=device))
    loss = torch.zeros((), device=device)
    for name in {"ddf", "inverse_ddf"} & set(found):
        assert found[name].shape == (2, len(size), *size) and found[name].dtype == torch.float32
        loss = loss + (found[name] - 1).square().mean()
    assert ("inverse_ddf" in found) == decoder.startswith("convic")
    loss.backward()
    # A norm takes away what a bias before it adds.
    idle = [n for n, p in network.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())]
    assert not idle


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_pairs_of_a_batch_know_nothing_of_each_other(decoder: str, device: torch.device) -> None:
    network = _network(2, decoder).to(device)
    image = torch.rand(2, 2, 16, 12, device=device)
    with torch.no_grad():
        torch.testing.assert_close(network(image), torch.cat([network(one[None]) for one in image]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_training_starts_next_to_the_identity(decoder: str) -> None:
    with torch.no_grad():
        ddf = DualStreamPyramid(2, decoder, **_SMALL)(torch.rand(1, 2, 16, 16))
    if decoder != "vfa":
        assert 0 < ddf.abs().max() < 1e-2
    else:
        assert ddf.abs().max() < 7  # no level takes more than a voxel, so three take no more than 1 + 2 + 4


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_fields_are_single_precision_under_autocast(decoder: str, device: torch.device) -> None:
    network = _network(2, decoder).to(device)
    image = torch.rand(1, 2, 16, 12, device=device)
    expected = network(image).detach()
    with torch.autocast(device.type, torch.bfloat16):
        ddf = network(image)
        loss = ddf.square().mean()
    loss.backward()
    assert ddf.dtype == torch.float32
    assert (ddf - expected).abs().max() < 0.1 * max(1.0, expected.abs().max().item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_the_fields_of_all_levels(decoder: str) -> None:
    network = _network(2, decoder, pyramid=True)
    with torch.no_grad():
        found = network.fields(torch.rand(1, 2, 13, 10))
    assert [tuple(field.shape) for field in found["pyramid"]] == [(1, 2, 13, 10)] * 3
    torch.testing.assert_close(found["pyramid"][-1], found["ddf"])


def test_images_encoded_one_after_the_other_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = _network(2, "conv_c"), torch.rand(1, 2, 16, 12)
    expected = network(image).detach()
    monkeypatch.setattr(pyramid, "_LARGE", 0)
    with torch.no_grad():
        torch.testing.assert_close(network(image), expected)


def test_wider_neighbourhoods() -> None:
    for decoder in ("conv_c", "vfa"):
        network = _network(2, decoder, decoder_options={"radius": 2})
        assert network(torch.rand(1, 2, 8, 8)).shape == (1, 2, 8, 8)


def test_what_it_cannot_be_it_says() -> None:
    with pytest.raises(ValueError, match=r"decoder must be one of .*'vfa'.*, got 'conv'"):
        DualStreamPyramid(2, "conv")
    with pytest.raises(ValueError, match="VoxelMorphEncoder sees both images at once"):
        DualStreamPyramid(2, encoder=VoxelMorphEncoder(2))
