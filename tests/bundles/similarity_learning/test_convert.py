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

import collections
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.similarity_learning.scripts.convert import (
    arguments_of,
    convert,
    read_weights,
    to_published,
    to_warpzoo,
)
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.voxelmorph import PublishedVoxelMorph
from tests.processes import run_python

UNET = {"downarm": [(2, 16), (16, 32), (32, 32), (32, 32)], "uparm": [(32, 32), (64, 32), (64, 32), (48, 32)]}
UNET |= {"extras": [(34, 32), (32, 16), (16, 16)]}


def _voxelmorph() -> dict[str, Tensor]:
    """The 24 tensors of a published VoxelMorph checkpoint, with weights that move things."""
    state = {}
    for part, convolutions in UNET.items():
        for n, (i, o) in enumerate(convolutions):
            state[f"unet_model.{part}.{n}.main.weight"] = torch.randn(o, i, 3, 3, 3) * (2 / (27 * i)) ** 0.5
            state[f"unet_model.{part}.{n}.main.bias"] = 0.05 * torch.randn(o)
    return state | {"flow.weight": 0.05 * torch.randn(3, 16, 3, 3, 3), "flow.bias": 0.05 * torch.randn(3)}


def _similarity(lcc: bool) -> dict[str, Tensor]:
    """A published similarity's weights."""
    state = {}
    for n, (i, o) in enumerate([(1, 4), (4, 8), (8, 8)]):
        state[f"enc.enc.{n}.main.weight"] = 0.3 * torch.randn(o, i, 3, 3, 3)
        state[f"enc.enc.{n}.main.bias"] = 0.1 * torch.randn(o)
    state["agg.weight"] = torch.randn(1, 8, 1)
    return state | ({"kernel.weight": 1 + 0.2 * torch.randn(1, 1, 3, 3, 3)} if lcc else {})


def _velocity_by_hand(state: dict[str, Tensor], pair: Tensor) -> Tensor:
    """The published U-Net by its table: full-resolution velocity of cat(moving, fixed)."""

    def step(name: str, x: Tensor, stride: int = 1) -> Tensor:
        y = F.conv3d(x, state[f"{name}.main.weight"], state[f"{name}.main.bias"], stride, 1)
        return F.leaky_relu(y, 0.2)

    levels = [pair]
    for n in range(4):
        levels.append(step(f"unet_model.downarm.{n}", levels[-1], 2))
    x = levels.pop()
    for n in range(4):
        x = F.interpolate(step(f"unet_model.uparm.{n}", x), scale_factor=2, mode="nearest")
        x = torch.cat((x, levels.pop()), 1)
    for n in range(3):
        x = step(f"unet_model.extras.{n}", x)
    return F.conv3d(x, state["flow.weight"], state["flow.bias"], padding=1)


def test_converted_voxelmorph_weights_give_the_published_velocity(tmp_path: Path) -> None:
    state = _voxelmorph()
    config = {"inshape": (128, 128, 128), "nb_unet_levels": None, "flow_log_sigma_bias": -5, "use_probs": False}
    torch.save({"config": config, "model_state": state}, tmp_path / "checkpoint_VXM_SSD_learnt.pt")
    convert(str(tmp_path / "checkpoint_VXM_SSD_learnt.pt"), str(tmp_path / "ours.pt"))
    network = PublishedVoxelMorph().eval()
    network.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    assert sum(t.numel() for t in state.values()) == 301_411 and len(state) == 24
    pair = torch.rand(1, 2, 32, 16, 48)
    with torch.no_grad():
        velocity = network.fields(pair)["velocity"]
    expected = _velocity_by_hand(state, pair)
    assert expected.abs().max() > 0.5
    assert torch.allclose(velocity, expected, atol=1e-5)


def _map_by_hand(state: dict[str, Tensor], image: Tensor) -> Tensor:
    for n in range(3):
        image = F.pad(image, (1,) * 6, mode="replicate")
        image = F.leaky_relu(F.conv3d(image, state[f"enc.enc.{n}.main.weight"], state[f"enc.enc.{n}.main.bias"]), 0.2)
    return F.conv1d(image.flatten(2), state["agg.weight"]).view(-1, 1, *image.shape[2:])


def _lcc_by_hand(f: Tensor, m: Tensor, kernel: Tensor) -> Tensor:
    def box(x: Tensor) -> Tensor:
        return F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), kernel)

    f, m = f - box(f) / 27, m - box(m) / 27
    return -(box(f * m) ** 2 / (box(f * f) * box(m * m) + 1e-5)).sum()


@pytest.mark.parametrize("kind", ["ssd", "lcc"])
def test_a_converted_similarity_gives_the_published_energy(kind: str, tmp_path: Path) -> None:
    state = _similarity(kind == "lcc")
    torch.save({"epoch": 50, "step": 7, "model": state, "optimizer": {"state": {}}}, tmp_path / "theirs.pt")
    ours = to_warpzoo(read_weights(tmp_path / "theirs.pt"))
    assert sum(t.numel() for t in ours.values()) == {"ssd": 2728, "lcc": 2755}[kind]
    similarity = Similarity(kind, learnt=True, train_lcc_kernel=kind == "lcc")
    similarity.load_state_dict({name.removeprefix("similarity."): value for name, value in ours.items()})
    fixed, moved = torch.rand(2, 1, 1, 9, 10, 11)
    f, m = _map_by_hand(state, fixed), _map_by_hand(state, moved)
    expected = 0.5 * (f - m).square().sum() if kind == "ssd" else _lcc_by_hand(f, m, state["kernel.weight"])
    found = similarity.energy(similarity.reference(fixed), moved)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("state", [_voxelmorph(), _similarity(True), _similarity(False)], ids=["VXM", "LCC", "SSD"])
def test_there_and_back_is_the_identity(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "theirs.pt")
    convert(str(tmp_path / "theirs.pt"), str(tmp_path / "ours.pt"))
    convert(str(tmp_path / "ours.pt"), str(tmp_path / "back.pt"), published=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_weights_tell_what_a_network_is_built_with() -> None:
    found = arguments_of(to_warpzoo(_similarity(True)))
    assert found == {
        "spatial_dims": 3,
        "learnt": True,
        "channels": (4, 8, 8),
        "similarity": "lcc",
        "lcc_window": 1,
        "train_lcc_kernel": True,
    }
    assert arguments_of(to_warpzoo(_voxelmorph())) == {"spatial_dims": 3, "in_channels": 2}
    plane = Similarity("ssd", learnt=True, spatial_dims=2, channels=(3, 5)).state_dict()
    found = arguments_of({f"similarity.{name}": tensor for name, tensor in plane.items()})
    assert found == {"spatial_dims": 2, "learnt": True, "channels": (3, 5)}


def test_prefixes_and_grids_are_dropped(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in _voxelmorph().items()}
    torch.save({"model_state": state | {"module.transformer.grid": torch.zeros(1, 3, 4, 4, 4)}}, tmp_path / "x.pt")
    assert set(to_warpzoo(read_weights(tmp_path / "x.pt"))) == set(PublishedVoxelMorph().state_dict())


class _Hostile:
    """Pickles as a call."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (subprocess.check_call, (["touch", str(self.marker)],))


def _with_config_object(path: Path, state: dict[str, Tensor], **more: Any) -> None:
    """A checkpoint whose config is an object of a module that is not there when it is read."""
    module = types.ModuleType("parse_config")
    exec("class ConfigParser:\n    pass", module.__dict__)
    sys.modules["parse_config"] = module
    try:
        config = module.ConfigParser()
        config.settings = collections.OrderedDict(save_dir=path.parent, lr=0.01, **more)
        torch.save({"epoch": 3, "config": config, "model": state, "optimizer_q_phi": {"state": {}}}, path)
    finally:
        del sys.modules["parse_config"]


def test_a_config_object_in_the_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = _similarity(False)
    _with_config_object(tmp_path / "SSD_learnt.pt", state)
    with caplog.at_level("INFO"):
        found = read_weights(tmp_path / "SSD_learnt.pt")
    assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    assert "parse_config.ConfigParser" in caplog.text and "parse_config" not in sys.modules


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    _with_config_object(tmp_path / "x.pt", _similarity(False), trap=_Hostile(marker))
    assert len(read_weights(tmp_path / "x.pt")) == 7 and not marker.exists()
    with pytest.raises(Exception, match="parse_config"):
        torch.load(tmp_path / "x.pt", weights_only=False)  # what is avoided: it looks classes up, and would call
    torch.save({"model": _similarity(False), "trap": _Hostile(marker)}, tmp_path / "y.pt")
    torch.load(tmp_path / "y.pt", weights_only=False)
    assert marker.exists(), "the trap works where pickles are trusted"


class _Sequence(list):  # type: ignore[type-arg]
    """What the reader cannot put an inert object in the place of: it is filled item by item."""


def test_what_cannot_be_left_out_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"model": _similarity(False), "config": _Sequence([1, 2])}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt was not read.*torch\.save\(\{'model': checkpoint\['model'\]\}"):
        read_weights(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"y\.pt was not read"):
        read_weights(tmp_path / "y.pt")
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_weights(tmp_path / "nothing.pt")


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 weights have no place in the published VoxelMorph, such as \['flow2\.w"):
        to_warpzoo(_voxelmorph() | {"flow2.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no place in the published similarity, such as \['enc\.norm"):
        to_warpzoo(_similarity(False) | {"enc.norm": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no place in our similarity"):
        to_published({"other": torch.zeros(1)})
    torch.save({"weights": {"conv.weight": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"neither enc\.enc\.0\.main\.weight nor .* its tensors are \['conv\.weight'"):
        read_weights(tmp_path / "x.pt")


def test_the_command_runs_from_the_root(tmp_path: Path, repository: Path) -> None:
    torch.save({"config": {}, "model_state": _voxelmorph()}, tmp_path / "theirs.pt")
    command = ["bundles/similarity_learning/scripts/convert.py", str(tmp_path / "theirs.pt")]
    done = run_python([*command, str(tmp_path / "ours.pt")], repository)
    assert done.returncode == 0, done.stderr
    assert "301411 numbers, spatial_dims=3" in done.stderr
    PublishedVoxelMorph().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
