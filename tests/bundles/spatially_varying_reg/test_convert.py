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

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.spatially_varying_reg.scripts.convert import arguments_of, convert, to_published, to_warpzoo
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR
from common.networks import average_pool
from tests.processes import run_python

_TINY: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (4, 4, 4), "steps": 3}


def _network(**options: Any) -> TransMorphSPR:
    return TransMorphSPR(**{**_TINY, "window_size": 2, "norm": "batch", **options})


def _published(state: dict[str, Tensor], size: int = 32) -> dict[str, Tensor]:
    """As the authors save it: with the unused head, index buffers and sampling grids."""
    state = to_published(state)
    extra = {
        name.replace("bias_table", "index"): torch.zeros(8, 8, dtype=torch.long)
        for name in state
        if name.endswith("bias_table")
    }
    extra |= {"reg_head.0.weight": torch.zeros(3, 16, 3, 3, 3), "reg_head.0.bias": torch.zeros(3)}
    return state | extra | {"spatial_trans.grid": torch.zeros(1, 3, size, size, size)}


@pytest.mark.parametrize(
    ("window", "numbers"), [((5, 6, 7), 17_660_065), ((2, 2, 2), 17_529_025)], ids=["IXI", "64 voxels"]
)
def test_parameters_of_the_published_networks(window: tuple[int, ...], numbers: int) -> None:
    unused = 16 * 3 * 27 + 3
    network = TransMorphSPR(window_size=window, norm="batch")
    assert sum(p.numel() for p in network.parameters()) + unused == numbers
    # 26.4 million numbers of sampling grids would make it 177 MB.
    assert sum(t.numel() * t.element_size() for t in network.state_dict().values()) < 80e6


def _weight(name: str, shape: Sequence[int]) -> Tensor:
    z = 0.05 * np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(math.prod(shape))
    z += len(shape) == 1 and name.endswith(".weight")
    return torch.from_numpy(z.reshape(shape).astype(np.float32))


def _is_parameter(name: str) -> bool:
    return not any(part in name for part in ("running", "num_batches", "index", "grid"))


@pytest.fixture(scope="module")
def published_weights() -> dict[str, Tensor]:
    state = _published(_network().state_dict())
    return {name: _weight(name, t.shape) if _is_parameter(name) else t for name, t in state.items()}


@pytest.fixture(scope="module")
def pair() -> Tensor:
    """Images of 64 voxels, pooled to 32."""
    random = np.random.RandomState(0)
    both = np.concatenate([random.rand(1, 1, 64, 64, 64) for _ in range(2)], axis=1)
    return average_pool(torch.from_numpy(both.astype(np.float32)), 2)


def _fields(weights: dict[str, Tensor], pair: Tensor, **options: Any) -> dict[str, Tensor]:
    network = _network(update="self_warped", **options).eval()
    network.load_state_dict(to_warpzoo(weights))
    with torch.no_grad():
        return network.fields(pair)


def test_published_weights_give_the_published_field(published_weights: dict[str, Tensor], pair: Tensor) -> None:
    ddf = _fields(published_weights, pair, downsample=1)["ddf"]
    assert ddf.double().sum().item() == pytest.approx(7134.6862, rel=1e-5)
    assert ddf.abs().mean().item() == pytest.approx(0.70140003, abs=1e-6)
    assert ddf[0, :, 5, 7, 9].tolist() == pytest.approx([0.48722088, -0.0077663073, -1.7352037], abs=1e-5)


def test_published_weights_give_the_published_weight_map(published_weights: dict[str, Tensor], pair: Tensor) -> None:
    # Blocks of equal voxels: pooled by two they are the pair of the figures.
    image = pair
    for axis in (2, 3, 4):
        image = image.repeat_interleave(2, axis)
    fields = _fields(published_weights, image)
    weights = fields["weight_map"]
    assert weights.shape == (1, 1, 64, 64, 64)
    assert weights.double().sum().item() == pytest.approx(181310.75, rel=1e-6)
    assert weights[0, 0, 10, 14, 18].item() == pytest.approx(0.73509777, abs=1e-6)
    # Values double with the grid, so the sum grows by sixteen; at the border a voxel has less to interpolate between.
    assert fields["ddf"].double().sum().item() == pytest.approx(16 * 7134.6862, rel=1e-5)


def test_there_and_back_is_the_identity() -> None:
    ours = _network(window_size=(2, 3, 4)).state_dict()
    back = to_warpzoo(to_published(ours), window=(2, 3, 4))
    assert set(back) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name


def test_every_published_name_of_the_decoder() -> None:
    names = {n for n in to_published(_network().state_dict()) if not n.startswith("transformer.") and _is_parameter(n)}
    norm = ("1.weight", "1.bias")
    expected = {f"up{n}.conv{k}.0.weight" for n in range(3) for k in (1, 2)}
    expected |= {f"c1.{part}" for part in ("0.weight", *norm)}
    for t in range(3):
        expected |= {f"cs.{t}.{part}" for part in ("0.weight", *norm)}
        expected |= {f"up3s.{t}.conv{k}.0.weight" for k in (1, 2)}
        expected |= {f"reg_heads.{t}.0.{kind}" for kind in ("weight", "bias")}
    expected |= {f"sigma_{n}.{part}" for n in (0, 1) for part in ("0.weight", *norm)}
    assert names == expected | {"sigma_2.weight", "sigma_2.bias"}


def test_without_batch_norms_and_weight_map() -> None:
    """The form with instance norms has no weights for them."""
    ours = _network(norm="instance", weight_map=False).state_dict()
    theirs = to_published(ours)
    assert not [name for name in theirs if name.startswith(("c1.1.", "cs.0.1.", "sigma"))]
    assert set(to_warpzoo(theirs)) == set(ours)


@pytest.mark.parametrize("options", [{}, {"norm": "instance", "channels": 2, "depths": (1, 3, 2), "weight_map": False}])
def test_weights_tell_what_the_network_is_built_with(options: dict[str, Any]) -> None:
    network = _network(**options)
    found = arguments_of(network.state_dict())
    other = TransMorphSPR(**found)
    other.load_state_dict(network.state_dict())
    assert found["window_size"] == (2, 2, 2)
    assert found["depths"] == options.get("depths", (2, 2, 2)) and found["num_heads"] == (4, 4, 4)


def test_prefixes_grids_and_the_unused_head_are_dropped(tmp_path: Path) -> None:
    ours = _network().state_dict()
    state = {f"module.{name}": tensor for name, tensor in _published(ours).items()}
    torch.save({"epoch": 3, "state_dict": state, "best_dsc": np.float64(0.75)}, tmp_path / "dsc0.75.pth.tar")
    convert(str(tmp_path / "dsc0.75.pth.tar"), str(tmp_path / "ours.pt"))
    loaded = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert set(loaded) == set(ours)
    _network().load_state_dict(loaded)


def test_the_window_follows_from_the_grid_or_is_given() -> None:
    ours = _network(window_size=(2, 3, 4)).state_dict()
    theirs = _published(ours) | {"spatial_trans.grid": torch.zeros(1, 3, 32, 48, 64)}
    assert set(to_warpzoo(theirs)) == set(ours)
    del theirs["spatial_trans.grid"]
    with pytest.raises(ValueError, match="give it as --window"):
        to_warpzoo(theirs)
    assert set(to_warpzoo(theirs, (2, 3, 4))) == set(ours)


def test_unknown_names_are_refused() -> None:
    state = _published(_network().state_dict())
    with pytest.raises(
        ValueError, match=r"1 weights have no place in the published TransMorphSPR, such as \['c2\.0\.weig"
    ):
        to_warpzoo(state | {"c2.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder is called 'pos_drop\.weight'"):
        to_warpzoo(state | {"transformer.pos_drop.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"our TransMorphSPR, such as \['other'"):
        to_published({"other": torch.zeros(1)})


def test_the_command_runs_from_the_root(tmp_path: Path, repository: Path) -> None:
    torch.save(_published(_network().state_dict()), tmp_path / "theirs.pth.tar")
    command = ["bundles/spatially_varying_reg/scripts/convert.py", str(tmp_path / "theirs.pth.tar")]
    done = run_python([*command, str(tmp_path / "ours.pt")], repository)
    assert done.returncode == 0, done.stderr
    assert "steps=3" in done.stderr and "norm='batch'" in done.stderr
    _network().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
