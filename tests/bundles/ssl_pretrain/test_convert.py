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

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.ssl_pretrain.scripts.convert import convert, infer_window, to_published, to_warpzoo
from bundles.ssl_pretrain.scripts.ssl_network import SSLRegistration
from common.networks import SwinEncoder
from tests.processes import run_python


def _encoder(window: Any = 2) -> SwinEncoder:
    return SwinEncoder(embed_dim=8, depths=(2, 1, 1), num_heads=(2, 2, 2), window_size=window)


def _published(window: Any = 2, grid: tuple[int, ...] = (64, 64, 64)) -> dict[str, Tensor]:
    """A state dict as the authors save it: with index buffers and a sampling grid."""
    state = to_published(SSLRegistration(_encoder(window)).state_dict())
    state |= {
        name.replace("bias_table", "index"): torch.zeros(8, 8, dtype=torch.long)
        for name in list(state)
        if name.endswith("bias_table")
    }
    return state | {"spatial_trans.grid": torch.zeros(1, 3, *grid)}


def _checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).state_dict()
    torch.save({"epoch": 3, "state_dict": state, "best_mse": np.float64(0.75), "optimizer": optimizer}, path)
    return path


def test_there_and_back_is_the_identity() -> None:
    ours = SSLRegistration(_encoder((2, 3, 3))).state_dict()
    back = to_warpzoo(to_published(ours), window=(2, 3, 3))
    assert list(back) != []
    assert set(back) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name


def test_the_published_network_has_their_number_of_entries() -> None:
    state = to_published(SSLRegistration(SwinEncoder()).state_dict())
    blocks, grids = 13, 1
    assert len(state) + blocks + grids == 214


def test_names_and_layouts_by_hand() -> None:
    ours = {
        "encoder.stages.1.blocks.2.mlp.linear1.weight": torch.arange(2.0).view(2, 1),
        "encoder.norms.2.bias": torch.arange(3.0),
        "encoder.merges.0.norm.weight": torch.arange(8.0),
        "encoder.stages.0.blocks.0.attn.relative_position_bias_table": torch.arange(54.0).view(2, 3, 3, 3),
        "head.blocks.0.conv2.bias": torch.zeros(1),
        "head.blocks.2.conv1.weight": torch.ones(1),
        "head.ensemble.logvar.conv.bias": torch.full((3,), -10.0),
    }
    theirs = to_published(ours)
    assert set(theirs) == {
        "encoder.layers.1.blocks.2.mlp.fc1.weight",
        "encoder.norm2.bias",
        "encoder.layers.0.downsample.norm.weight",
        "encoder.layers.0.blocks.0.attn.relative_position_bias_table",
        "decoder_blocks.2.block.4.bias",  # their level 0 is the coarsest, ours the finest
        "decoder_blocks.0.block.0.weight",
        "flow_block_final.flow_sigma.bias",
    }
    # Ours are in the order 000, 001, 010, 011, 100, 101, 110, 111; theirs 000, 100, 010, 001, 110, 011, 101, 111.
    assert theirs["encoder.layers.0.downsample.norm.weight"].tolist() == [0, 4, 2, 1, 6, 3, 5, 7]
    table = theirs["encoder.layers.0.blocks.0.attn.relative_position_bias_table"]
    assert table.shape == (27, 2)
    assert table[:3].tolist() == [[0, 27], [1, 28], [2, 29]]


def test_a_whole_checkpoint_loads_strictly(tmp_path: Path) -> None:
    state = _published((2, 3, 3), grid=(80, 96, 112))
    convert(str(_checkpoint(tmp_path / "dsc0.753.pth.tar", state)), str(tmp_path / "ours.pt"))
    network = SSLRegistration(_encoder((2, 3, 3)))
    network.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    torch.testing.assert_close(network.encoder.patch_embed.proj.weight, state["encoder.patch_embed.proj.weight"])


@pytest.mark.parametrize("prefix", ["encoder.", "transformer.", ""])
def test_the_encoder_alone_from_any_network(prefix: str) -> None:
    state = {k.replace("encoder.", prefix): v for k, v in _published().items() if k.startswith("encoder.")}
    if prefix:
        state["up0.conv1.0.weight"] = torch.zeros(1)
    _encoder().load_state_dict(to_warpzoo(state, "encoder"))


@pytest.mark.parametrize(
    ("rows", "grid", "window"),
    [
        (27, None, (2, 2, 2)),
        (125, None, (3, 3, 3)),
        (75, (80, 96, 112), (2, 3, 3)),
        (9 * 11 * 13, (80, 96, 112), (5, 6, 7)),
        (125, (80, 96, 112), (3, 3, 3)),
    ],
)
def test_window_of_a_checkpoint(rows: int, grid: tuple[int, ...] | None, window: tuple[int, ...]) -> None:
    state = {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(rows, 2)}
    if grid:
        state["spatial_trans.grid"] = torch.zeros(1, 3, *grid)
    assert infer_window(state) == window


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(ValueError, match="75 rows do not tell the window"):
        infer_window({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(75, 2)})
    with pytest.raises(ValueError, match="not a Swin"):
        to_warpzoo({"conv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"27 rows; window \(3, 3, 3\) needs 125"):
        to_warpzoo(_published(), window=(3, 3, 3))
    with pytest.raises(ValueError, match=r"head is called 'sigma_0\.weight'"):
        to_warpzoo(_published() | {"sigma_0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder is called 'pos_drop\.weight'"):
        to_warpzoo(_published() | {"encoder.pos_drop.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'decoder'"):
        to_warpzoo(_published(), "decoder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'other\.weight' has no published name"):
        to_published({"other.weight": torch.zeros(1)})


def test_the_command_runs_from_the_root(tmp_path: Path, repository: Path) -> None:
    source = _checkpoint(tmp_path / "theirs.pth.tar", _published())
    command = ["bundles/ssl_pretrain/scripts/convert.py", str(source), str(tmp_path / "ours.pt")]
    done = run_python([*command, "--part", "encoder", "--window", "2,2,2"], repository)
    assert done.returncode == 0, done.stderr
    assert "window (2, 2, 2)" in done.stderr
    _encoder().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
