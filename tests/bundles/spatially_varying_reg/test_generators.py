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
"""Weights made from a code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bundles.spatially_varying_reg.scripts.generators import (
    FullGenerator,
    HyperMLP,
    LowRankGenerator,
    modulated_shapes,
)
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR

_SHAPES = {"a.b.weight": (4, 3, 2, 2), "a.b.bias": (4,), "a.0.weight": (5, 4)}


def _network(spatial_dims: int = 3, **options: Any) -> TransMorphSPR:
    small = {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "steps": 2, "step_channels": 4}
    return TransMorphSPR(spatial_dims, **{**small, **options})


def test_mlp_is_six_relu_layers() -> None:
    mlp, x = HyperMLP(2, 96), torch.rand(7, 2)
    state = mlp.state_dict()
    assert [tuple(state[f"layers.{k}.weight"].shape) for k in range(6)] == [(96, 2)] + [(96, 96)] * 5
    expected = x
    for k in range(6):
        expected = torch.clamp(expected @ state[f"layers.{k}.weight"].T + state[f"layers.{k}.bias"], min=0)
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp(x) == 0).any()


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_modulated(dims: int) -> None:
    """All convolutions and linear layers but the patch mergings; no norm, no table of position biases."""
    network = _network(dims, norm="batch")
    shapes = modulated_shapes(network)
    left = {name for name, _ in network.named_parameters()} - set(shapes)
    assert all("norm" in n or "relative_position_bias_table" in n or n.endswith("reduction.weight") for n in left)
    assert not any("norm" in n or "table" in n or "reduction" in n for n in shapes)
    assert {"encoder.patch_embed.proj.bias", "weight_head.last.bias", "time_steps.steps.1.head.conv.weight"} <= set(
        shapes
    )
    assert "encoder.stages.0.blocks.1.attn.qkv.weight" in shapes
    state = network.state_dict()
    assert all(tuple(state[name].shape) == shape for name, shape in shapes.items())


def test_full_generator_by_numpy() -> None:
    generator, code = FullGenerator(_SHAPES, 6), torch.rand(6)
    made = generator(code)
    for name, shape in _SHAPES.items():
        weight = np.asarray(generator.state_dict()[f"maps.{name}"], dtype=np.float64)
        expected = np.array([sum(a * b for a, b in zip(row, code.tolist(), strict=True)) for row in weight])
        torch.testing.assert_close(made[name], torch.from_numpy(expected.reshape(shape)).float())


def test_full_generator_scales() -> None:
    generator = FullGenerator({"a.weight": (100, 10), "head.weight": (100, 10)}, 96, small=["head.weight"])
    maps = generator.state_dict()
    assert maps["maps.a.weight"].abs().max().item() == pytest.approx(96**-0.5, rel=0.01)
    assert maps["maps.head.weight"].std().item() == pytest.approx(1e-5, rel=0.02)


def test_low_rank_starts_without_a_change() -> None:
    made = LowRankGenerator(_SHAPES, 6, rank=2)(torch.rand(6))
    assert {name: tuple(t.shape) for name, t in made.items()} == _SHAPES
    assert all((t == 0).all() for t in made.values())


@pytest.mark.parametrize("rank", [1, 2, 50])
def test_low_rank_generator_as_a_sum_of_rank_one(rank: int) -> None:
    generator, code = LowRankGenerator(_SHAPES, 6, rank), torch.rand(6)
    for parameter in generator.parameters():
        nn.init.normal_(parameter)
    state, made = generator.state_dict(), generator(code)
    strengths = state["coefficients.weight"] @ code
    assert {"a.b": min(rank, 4), "a.0": min(rank, 4)} == generator.ranks
    start = 0
    for layer, r in generator.ranks.items():
        left, right = state[f"left.{layer}"], state[f"right.{layer}"]
        change = sum(strengths[start + k] * torch.outer(left[:, k], right[k]) for k in range(r))
        start += r
        assert isinstance(change, Tensor)
        weight = made[f"{layer}.weight"].flatten(1)
        torch.testing.assert_close(weight, change[:, : weight.shape[1]])
        if f"{layer}.bias" in made:
            torch.testing.assert_close(made[f"{layer}.bias"], change[:, -1])
            assert change.shape[1] == weight.shape[1] + 1
        assert torch.linalg.matrix_rank(change) <= r


def test_low_rank_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LowRankGenerator(_SHAPES, 6, rank=0)


def test_codes_make_different_weights() -> None:
    for generator in (FullGenerator(_SHAPES, 6), LowRankGenerator(_SHAPES, 6, 2)):
        for parameter in generator.parameters():
            nn.init.normal_(parameter)
        one, two = generator(torch.rand(6)), generator(torch.rand(6))
        assert all((one[name] - two[name]).abs().max() > 1e-3 for name in _SHAPES)


class _Modulated(nn.Module):
    """A convolution, an activation and a norm, and a linear layer, whose weights are W z, written out."""

    def __init__(self, maps: dict[str, Tensor], code: Tensor) -> None:
        super().__init__()
        self.kernel = (maps["conv.weight"] @ code).reshape(5, 2, 3, 3, 3)
        self.matrix = (maps["linear.weight"] @ code).reshape(3, 5)
        self.offset = maps["linear.bias"] @ code

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv3d(x, self.kernel, padding=1)
        y = torch.where(y > 0, y, 0.01 * y)
        flat = y.flatten(2)
        flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return torch.einsum("oc,bcn->bno", self.matrix, flat) + self.offset


def test_full_layers_by_hand() -> None:
    """The published unit: convolution, leaky ReLU, instance norm; then a linear layer."""
    from common.networks import ConvUnit

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit, self.linear = ConvUnit(3, 2, 5, activation_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.unit(x).flatten(2).mT)
            return out

    plain = Plain()
    shapes = modulated_shapes(plain)
    assert set(shapes) == {"unit.conv.weight", "linear.weight", "linear.bias"}
    generator, code, x = FullGenerator(shapes, 8), torch.rand(8), torch.randn(2, 2, 5, 6, 7)
    maps = {name.replace("unit.conv", "conv"): generator.maps.get_parameter(name) for name in shapes}
    got = functional_call(plain, generator(code), (x,))
    torch.testing.assert_close(got, _Modulated(maps, code)(x), atol=1e-5, rtol=1e-4)
    loss = [f.square().sum() for f in (got, _Modulated(maps, code)(x))]
    for a, b in zip(*(torch.autograd.grad(v, list(maps.values())) for v in loss), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)
