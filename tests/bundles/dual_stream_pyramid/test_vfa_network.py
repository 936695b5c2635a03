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
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.dual_stream_pyramid.scripts.convert import to_published
from bundles.dual_stream_pyramid.scripts.vfa_network import VFANetwork

SMALL: dict[str, Any] = {"start_channels": 4, "matching_channels": 4, "max_channels": 8, "downsamples": 2}


def _network(dims: int, beta: float = 0.8, **options: Any) -> VFANetwork:
    """A small network with steps that can be seen."""
    network = VFANetwork(dims, initial_beta=beta, **{**SMALL, **options})
    for step in network.steps:
        step.projection.weight.data *= 6
    return network


class _Published:
    """The authors' algorithm on sampling grids (absolute voxel coordinates), from their names of the weights."""

    def __init__(self, state: dict[str, Tensor], dims: int) -> None:
        self.state, self.dims = state, dims
        self.levels = sum(name.startswith("decoder.project.") for name in state) // 2
        self.conv = F.conv2d if dims == 2 else F.conv3d
        self.pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        self.mode = "bilinear" if dims == 2 else "trilinear"

    def _unit(self, x: Tensor, conv: str, norm: str) -> Tensor:
        x = self.conv(x, self.state[f"{conv}.weight"], self.state[f"{conv}.bias"], padding=1)
        x = F.instance_norm(x, weight=self.state[f"{norm}.weight"], bias=self.state[f"{norm}.bias"])
        return F.leaky_relu(x, 0.01)

    def _double(self, x: Tensor, name: str) -> Tensor:
        return self._unit(self._unit(x, f"{name}.conv1", f"{name}.norm1"), f"{name}.conv2", f"{name}.norm2")

    def _enlarge(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode=self.mode, align_corners=True)

    def encode(self, x: Tensor) -> list[Tensor]:
        s = self.state
        x = F.instance_norm(x, weight=s["encoder.in_norm.weight"], bias=s["encoder.in_norm.bias"])
        x = F.leaky_relu(self.conv(x, s["encoder.in_conv.weight"], s["encoder.in_conv.bias"], padding=1), 0.01)
        skips = []
        for i in range(self.levels - 1):
            skips.append(self._double(x, f"encoder.encoder_conv.{i}"))
            x = self.pool(skips[-1], 2)
        maps = [self._double(x, "encoder.bottleneck_conv")]
        for i in reversed(range(self.levels - 1)):
            up = self._unit(self._enlarge(maps[0]), f"encoder.upsampling.{i}.conv", f"encoder.upsampling.{i}.norm")
            maps.insert(0, self._double(torch.cat((up, skips[i]), dim=1), f"encoder.decoder_conv.{i}"))
        return maps

    def _sample(self, x: Tensor, grid: Tensor) -> Tensor:
        last = torch.tensor(grid.shape[2:]).view(-1, *(1,) * self.dims) - 1
        normalised = (2 * grid / last - 1).movedim(1, -1).flip(-1)
        return F.grid_sample(x, normalised, align_corners=True, padding_mode="border")

    def _project(self, x: Tensor, level: int) -> Tensor:
        name = f"decoder.project.{level}"
        return self.conv(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=1)

    def _step(self, moving: Tensor, fixed: Tensor, level: int) -> Tensor:
        query = self._project(fixed, level)
        keys = self._project(F.pad(moving, (1,) * (2 * self.dims), mode="replicate"), level)
        scores, offsets = [], list(product((0, 1, 2), repeat=self.dims))
        for offset in offsets:
            window = keys[(..., *(slice(o, o + n) for o, n in zip(offset, query.shape[2:], strict=True)))]
            scores.append((query * window).sum(1) / query.shape[1] ** 0.5)
        weights = torch.stack(scores, dim=1).softmax(1)
        return torch.einsum("bn...,nk->bk...", weights, torch.tensor(offsets).float() - 1)

    def field(self, image: Tensor) -> Tensor:
        moving, fixed = (self.encode(one) for one in image.chunk(2, dim=1))
        grid = None
        for level in reversed(range(self.levels)):
            size = fixed[level].shape[2:]
            here = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij"))[None]
            if grid is not None:
                last = torch.tensor(size).view(1, -1, *(1,) * self.dims) - 1
                grid = self._enlarge(grid / (torch.tensor(grid.shape[2:]).view_as(last) - 1) * last)
            moved = moving[level] if grid is None else self._sample(moving[level], grid)
            step = here + self.state["decoder.beta"] * self._step(moved, fixed[level], level)
            grid = step if grid is None else self._sample(grid, step)
        return grid - here


def test_published_number_of_parameters() -> None:
    network = VFANetwork()
    assert sum(p.numel() for p in network.encoder.parameters()) == 1_720_882
    assert sum(p.numel() for p in network.parameters()) == 2_014_827
    assert network.beta.tolist() == [pytest.approx(0.1)]


@pytest.mark.parametrize("size", [(16, 24), (8, 12, 16)])
def test_it_is_the_published_algorithm(size: Sequence[int]) -> None:
    network = _network(len(size), beta=1.6)
    image = torch.rand(2, 2, *size)
    with torch.no_grad():
        expected = _Published(to_published(network.state_dict(), "vfa"), len(size)).field(image)
        torch.testing.assert_close(network(image), expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 3  # some steps leave the image


@pytest.mark.parametrize("size", [(16, 12), (7, 13), (6, 9, 8)])
def test_any_size_runs_and_learns(size: Sequence[int], device: torch.device) -> None:
    network = _network(len(size)).to(device)
    ddf = network(torch.rand(2, 2, *size, device=device))
    assert ddf.shape == (2, len(size), *size) and ddf.dtype == torch.float32
    (ddf - 1).square().mean().backward()
    # A norm takes away what a bias before it adds.
    idle = [n for n, p in network.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())]
    assert not idle
    assert network.beta.grad is not None and network.beta.grad.any()


def test_beta_scales_the_steps() -> None:
    with torch.no_grad():
        assert not _network(2, beta=0.0)(torch.rand(1, 2, 8, 8)).any()
        # Maps of 16, 8 and 4 voxels, corner on corner: a step of the coarser ones counts 15/7 and 15/3 of the image.
        assert _network(2, beta=0.1)(torch.rand(1, 2, 16, 16)).abs().max() < 0.1 * (1 + 15 / 7 + 15 / 3)


def test_brightness_and_contrast_do_not_matter() -> None:
    network, image = _network(2), torch.rand(1, 2, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(3 * image + 2), network(image), atol=1e-2, rtol=0)


def test_pairs_of_a_batch_know_nothing_of_each_other() -> None:
    network, image = _network(2), torch.rand(2, 2, 16, 12)
    with torch.no_grad():
        torch.testing.assert_close(network(image), torch.cat([network(one[None]) for one in image]), atol=1e-4, rtol=0)


def test_the_field_is_single_precision_under_autocast(device: torch.device) -> None:
    network = VFANetwork(2, **SMALL).to(device)
    image = torch.rand(1, 2, 16, 12, device=device)
    expected = network(image).detach()
    with torch.autocast(device.type, torch.bfloat16):
        ddf = network(image)
        loss = ddf.square().mean()
    loss.backward()
    assert ddf.dtype == torch.float32
    assert (ddf - expected).abs().max() < 0.1 * max(1.0, expected.abs().max().item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_wider_neighbourhoods() -> None:
    network = _network(2, beta=0.5, radius=2)
    assert network(torch.rand(1, 2, 8, 8)).shape == (1, 2, 8, 8)
