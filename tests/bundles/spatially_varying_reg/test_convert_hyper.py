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
"""The authors' hyper networks as ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bundles.spatially_varying_reg.scripts.convert_hyper import convert, to_published, to_warpzoo
from bundles.spatially_varying_reg.scripts.hyper import HyperTransMorphSPR
from tests.processes import run_python

_TINY: dict[str, Any] = {"embed_dim": 8, "depths": (2, 1, 1), "num_heads": (2, 2, 2), "steps": 2, "window_size": 2}


def _network(**options: Any) -> HyperTransMorphSPR:
    return HyperTransMorphSPR(generator="full", norm="batch", code_channels=6, **{**_TINY, **options})


def _dead(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the authors save beside: maps to biases that are not added, an unused head, buffers."""
    dead: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.*(?:\.conv|\.qkv))\.linear_(?:wts|conv)\.weight", name)
        if found:
            dead[f"{found[1]}.linear_bias.weight"] = torch.randn(5, tensor.shape[1])
    dead |= {"reg_head.conv3d.linear_conv.weight": torch.zeros(1296, 6)}
    dead |= {"reg_head.conv3d.linear_bias.weight": torch.zeros(3, 6)}
    return dead | {"spatial_trans.grid": torch.zeros(1, 3, 32, 32, 32)}


def test_there_and_back_is_the_identity() -> None:
    ours = _network(window_size=(2, 3, 4)).state_dict()
    back = to_warpzoo(to_published(ours), window=(2, 3, 4))
    assert set(back) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name


def test_every_published_name_of_the_decoder() -> None:
    names = {n for n in to_published(_network().state_dict()) if not n.startswith("transformer.")}
    names = {n for n in names if not ("running" in n or "num_batches" in n)}
    weight, nm = "conv.linear_conv.weight", ("nm.weight", "nm.bias")
    expected = {f"hyper_model.fcs.{k}.{kind}" for k in range(6) for kind in ("weight", "bias")}
    expected |= {f"up{n}.conv{k}.{weight}" for n in range(3) for k in (1, 2)}
    expected |= {f"c1.{part}" for part in (weight, *nm)}
    for t in range(2):
        expected |= {f"cs.{t}.{part}" for part in (weight, *nm)}
        expected |= {f"up3s.{t}.conv{k}.{weight}" for k in (1, 2)}
        expected |= {f"reg_heads.{t}.conv3d.linear_{kind}.weight" for kind in ("conv", "bias")}
    expected |= {f"sigma_{n}.{part}" for n in (0, 1) for part in (weight, *nm)}
    assert names == expected | {"sigma_2.linear_conv.weight", "sigma_2.linear_bias.weight"}


def test_every_published_name_of_a_block() -> None:
    start = "transformer.layers.0.blocks.1."
    names = {n.removeprefix(start) for n in to_published(_network().state_dict()) if n.startswith(start)}
    expected = {f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    expected |= {"attn.relative_position_bias_table", "attn.qkv.linear_wts.weight"}
    expected |= {f"{n}.linear_{k}.weight" for n in ("attn.proj", "mlp.fc1", "mlp.fc2") for k in ("wts", "bias")}
    assert names == expected
    published = to_published(_network().state_dict())
    assert "transformer.layers.0.downsample.reduction.weight" in published
    assert published["transformer.patch_embed.proj.linear_conv.weight"].shape == (8 * 2 * 64, 6)
    assert published["transformer.patch_embed.proj.linear_bias.weight"].shape == (8, 6)


def test_a_published_layer_is_the_map_of_the_code(tmp_path: Path) -> None:
    """Row-major (out, in, k, k, k), as published."""
    network = _network()
    theirs = to_published(network.state_dict())
    code = torch.rand(6)
    made = network.generator(code)
    kernel = (theirs["up1.conv2.conv.linear_conv.weight"] @ code).reshape(8, 8, 3, 3, 3)
    torch.testing.assert_close(made["decoder.up.1.conv2.conv.weight"], kernel)
    matrix = (theirs["transformer.layers.1.blocks.0.attn.qkv.linear_wts.weight"] @ code).reshape(48, 16)
    torch.testing.assert_close(made["encoder.stages.1.blocks.0.attn.qkv.weight"], matrix)


def test_dead_weights_and_prefixes_are_dropped(tmp_path: Path) -> None:
    network, other = _network().eval(), _network().eval()
    theirs = to_published(network.state_dict())
    dead = _dead(theirs)
    assert len(dead) == 3 + 6 + 1 + 2 + 4 + 2 + 4  # as in the spec: units, two of each step, the weight head's, blocks
    state = {f"module.{name}": tensor for name, tensor in (theirs | dead).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "theirs.pth.tar")
    convert(str(tmp_path / "theirs.pth.tar"), str(tmp_path / "ours.pt"))
    other.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    image = torch.rand(1, 2, 32, 32, 32)
    for n in (network, other):
        n.condition(alpha=1.1, w=2.0)
    with torch.no_grad():
        torch.testing.assert_close(other(image), network(image))


def test_dead_weights_are_those_that_the_published_count_has_more() -> None:
    """26 tensors without a gradient in the published tiny network."""
    network = HyperTransMorphSPR(
        generator="full",
        norm="batch",
        window_size=2,
        embed_dim=24,
        depths=(2, 2, 2),
        num_heads=(4, 4, 4),
        steps=3,
        code_channels=6,
    )
    dead = [name for name in _dead(to_published(network.state_dict())) if name.endswith("weight")]
    assert len(dead) == 26


def test_others_are_refused() -> None:
    theirs = to_published(_network().state_dict())
    with pytest.raises(ValueError, match=r"use convert\.py for a plain one"):
        to_warpzoo({name: t for name, t in theirs.items() if not name.startswith("hyper_model")})
    with pytest.raises(ValueError, match="have no place in the published"):
        to_warpzoo(theirs | {"c2.conv.linear_conv.weight": torch.zeros(1, 6)}, window=(2, 2, 2))
    with pytest.raises(ValueError, match="2 weights have no place in our HyperTransMorphSPR"):
        to_published({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_the_command_runs_from_the_root(tmp_path: Path, repository: Path) -> None:
    theirs = to_published(_network().state_dict())
    torch.save(theirs, tmp_path / "theirs.pth.tar")
    command = ["bundles/spatially_varying_reg/scripts/convert_hyper.py"]
    done = run_python(
        [*command, str(tmp_path / "theirs.pth.tar"), str(tmp_path / "ours.pt"), "--window", "2,2,2"], repository
    )
    assert done.returncode == 0, done.stderr
    _network().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
