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
import torch.nn.functional as F
from torch import Tensor, nn

from bundles.dual_stream_pyramid.scripts.convert import to_published
from bundles.dual_stream_pyramid.scripts.transmorph import TransMorph

SMALL: dict[str, Any] = {
    "embed_dim": 24,
    "depths": (2, 2, 2),
    "num_heads": (4, 4, 4),
    "window_size": 4,
    "head_channels": 8,
}
_UNREAD = 2 * 16 * 27  # a convolution of the published network that nothing reads


def _network(dims: int, **options: Any) -> TransMorph:
    """A small network that moves."""
    network = TransMorph(dims, **{**SMALL, **options})
    nn.init.normal_(network.head.conv.weight, std=0.5)
    return network


def _unit(x: Tensor, weight: Tensor) -> Tensor:
    return F.leaky_relu(F.instance_norm(F.conv3d(x, weight, padding=1)), 0.01)


def _published_field(state: dict[str, Tensor], image: Tensor, features: Sequence[Tensor]) -> Tensor:
    """What the authors' decoder makes of the transformer's features: a field whose values are not doubled."""
    skips = [*reversed(features[:-1]), _unit(F.avg_pool3d(image, 3, 2, 1), state["c1.0.weight"])]
    x = features[-1]
    for i, skip in enumerate(skips):
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        for j in "12":
            x = _unit(torch.cat((x, skip), dim=1) if j == "1" else x, state[f"up{i}.conv{j}.0.weight"])
    flow = F.conv3d(x, state["reg_head.0.weight"], state["reg_head.0.bias"], padding=1)
    return F.interpolate(flow, scale_factor=2, mode="trilinear", align_corners=False)


def test_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in TransMorph().parameters()) + _UNREAD == 46_556_979


def test_published_weights_give_the_published_field(device: torch.device) -> None:
    network = _network(3, window_size=(2, 3, 2)).to(device).eval()
    nn.init.normal_(network.head.conv.bias)
    image = torch.rand(1, 2, 16, 32, 16, device=device)
    with torch.no_grad():
        expected = _published_field(to_published(network.state_dict(), "transmorph"), image, network.encoder(image))
        torch.testing.assert_close(network(image), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.3


@pytest.mark.parametrize("size", [(16, 32), (17, 23), (18, 9, 21)])
def test_any_size_runs_and_learns(size: Sequence[int], device: torch.device) -> None:
    network = _network(len(size), drop_path=0.0).to(device)
    ddf = network(torch.rand(2, 2, *size, device=device))
    assert ddf.shape == (2, len(size), *size) and ddf.dtype == torch.float32
    (ddf - 1).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_the_field_is_in_voxels_of_the_image() -> None:
    network = TransMorph(2, **SMALL)
    nn.init.zeros_(network.head.conv.weight)
    network.head.conv.bias.data = torch.tensor([1.5, -0.5])
    ddf = network(torch.rand(1, 2, 20, 16))
    torch.testing.assert_close(ddf, torch.tensor([3.0, -1.0]).view(1, 2, 1, 1).expand_as(ddf))


def test_training_starts_next_to_the_identity() -> None:
    ddf = TransMorph(2, **SMALL)(torch.rand(1, 2, 16, 16))
    assert 0 < ddf.abs().max() < 1e-2


def test_the_field_is_single_precision_under_autocast(device: torch.device) -> None:
    network = _network(2).to(device).eval()
    image = torch.rand(1, 2, 32, 32, device=device)
    expected = network(image).detach()
    with torch.autocast(device.type, torch.bfloat16):
        ddf = network(image)
        loss = ddf.square().mean()
    loss.backward()
    assert ddf.dtype == torch.float32
    assert (ddf - expected).abs().max() < 0.2 * expected.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_checkpointed_blocks_give_the_same() -> None:
    network, image = _network(2, drop_path=0.0), torch.rand(1, 2, 16, 16)
    again = _network(2, drop_path=0.0, use_checkpoint=True)
    again.load_state_dict(network.state_dict())
    for one in (network, again):
        one(image).square().mean().backward()
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_checkpoint_fits_every_image_size() -> None:
    network = _network(2)
    names = set(network.state_dict())
    network(torch.rand(1, 2, 20, 12))
    assert set(network.state_dict()) == names == {name for name, _ in network.named_parameters()}


def test_what_it_cannot_be_it_says() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        TransMorph(2, depths=(2, 2), num_heads=(4,))
    with pytest.raises(ValueError, match="1 channels; cat"):
        TransMorph(2, **SMALL)(torch.rand(1, 1, 16, 16))
