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
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bundles.dual_stream_pyramid.scripts.convert import (
    NETWORKS,
    convert,
    to_published,
    to_warpzoo,
)
from bundles.dual_stream_pyramid.scripts.pyramid import DECODERS, DualStreamPyramid
from bundles.dual_stream_pyramid.scripts.sitreg import SITReg
from bundles.dual_stream_pyramid.scripts.transmorph import TransMorph
from bundles.dual_stream_pyramid.scripts.vfa_network import VFANetwork
from common.networks import VoxelMorph
from tests.processes import run_python

_CONFIGURATIONS = {
    "conv_mf": "DP-Conv-MF",
    "conv_mfc": "DP-Conv-MFC",
    "conv_c": "DP-Conv-C",
    "convic_mf": "DP-ConvIC-MF",
    "convic_c": "DP-ConvIC-C",
    "vfa": "DP-VFA",
}


def _pyramid(decoder: str) -> DualStreamPyramid:
    return DualStreamPyramid(3, decoder, encoder_channels=(2, 4, 6), decoder_channels=(3, 4, 5))


def _transmorph(window: Any = (2, 3, 2)) -> TransMorph:
    return TransMorph(3, embed_dim=8, depths=(2, 1, 2), num_heads=(2, 2, 2), window_size=window, head_channels=4)


def _vfa() -> VFANetwork:
    return VFANetwork(3, start_channels=2, matching_channels=3, max_channels=8, downsamples=2)


def _sitreg() -> SITReg:
    return SITReg(3, channels=(4, 8, 8), head_channels=(4, 8, 12))


def _voxelmorph() -> VoxelMorph:
    return VoxelMorph(3, 2, (4, 6, 8), (8, 8, 6, 6, 4), integration_steps=0)


_SMALL: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    **{f"dual_stream {name}": ("dual_stream", lambda name=name: _pyramid(name)) for name in DECODERS},
    "vfa": ("vfa", _vfa),
    "sitreg": ("sitreg", _sitreg),
    "transmorph": ("transmorph", _transmorph),
    "voxelmorph": ("voxelmorph", _voxelmorph),
}
_cases = pytest.mark.parametrize("case", sorted(_SMALL))


def _scattered(network: nn.Module) -> nn.Module:
    """No two weights alike, the norms included."""
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def _window(network: str) -> tuple[int, ...] | None:
    return (2, 3, 2) if network == "transmorph" else None


def test_every_network_is_tested() -> None:
    assert {network for network, _ in _SMALL.values()} == set(NETWORKS)
    assert set(_CONFIGURATIONS) == set(DECODERS)


@_cases
def test_there_and_back_is_the_identity(case: str) -> None:
    network, build = _SMALL[case]
    ours = _scattered(build()).state_dict()
    theirs = to_published(ours, network)
    back = to_warpzoo(theirs, network, _window(network))
    assert list(theirs) and set(back) == set(ours)
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
    build().load_state_dict(back)


@pytest.mark.parametrize(("decoder", "configuration"), list(_CONFIGURATIONS.items()))
def test_published_names_and_shapes(decoder: str, configuration: str, shared: Path) -> None:
    order = json.loads((shared / "parity/dual_stream_pyramid/canonical_parameter_order.json").read_text())
    theirs = to_published(DualStreamPyramid(3, decoder).state_dict(), "dual_stream")
    assert {name: list(tensor.shape) for name, tensor in theirs.items()} == {e[1]: e[3] for e in order[configuration]}


def _by_rule(order: list[tuple[int, str, str, list[int]]]) -> dict[str, Tensor]:
    """A published state dict filled by the rule of the published arrays."""
    state = {}
    for number, name, kind, shape in order:
        z = np.random.RandomState(10000 + number).standard_normal(shape)
        scaled = {
            "conv.weight": z * np.sqrt(2 / (1.04 * np.prod(shape[1:]))),
            "flow.weight": 0.004 * z,
            "norm.weight": 1 + 0.1 * z,
            "norm.bias": 0.1 * z,
        }
        state[name] = torch.from_numpy(scaled.get(kind, 0.05 * z)).float()
    return state


@pytest.mark.parametrize(
    ("decoder", "options", "file", "fields", "tolerance"),
    [
        ("conv_mfc", {}, "DP-Conv-MFC_32x48x32", {"ddf": "disp"}, 2e-4),
        (
            "convic_mf",
            {"tolerance": 1e-5},
            "DP-ConvIC-MF_32x48x32_tight",
            {"ddf": "disp_fwd", "inverse_ddf": "disp_inv"},
            1e-4,
        ),
    ],
)
def test_published_fields(
    decoder: str, options: dict[str, Any], file: str, fields: dict[str, str], tolerance: float, shared: Path
) -> None:
    folder = shared / "parity/dual_stream_pyramid"
    order = json.loads((folder / "canonical_parameter_order.json").read_text())[_CONFIGURATIONS[decoder]]
    network = DualStreamPyramid(3, decoder, decoder_options=options)
    network.load_state_dict(to_warpzoo(_by_rule(order), "dual_stream"))
    images = np.load(folder / "DP-Conv-MFC_32x48x32.npz")
    with torch.no_grad():
        found = network.fields(torch.from_numpy(np.concatenate((images["moving"], images["fixed"]), axis=1)))
    expected = np.load(folder / f"{file}.npz")
    for ours, theirs in fields.items():
        torch.testing.assert_close(found[ours], torch.from_numpy(expected[theirs]), atol=tolerance, rtol=0)


def _vxm_field(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The authors' VoxelMorph, from their names of the weights."""

    def block(y: Tensor, name: str, stride: int = 1) -> Tensor:
        weight, bias = state[f"unet_model.{name}.main.weight"], state[f"unet_model.{name}.main.bias"]
        return F.leaky_relu(F.conv3d(y, weight, bias, stride, 1), 0.2)

    maps = [x]
    for i in range(3):
        maps.append(block(maps[-1], f"downarm.{i}", stride=2))
    y = maps.pop()
    for i in range(3):
        y = torch.cat((F.interpolate(block(y, f"uparm.{i}"), scale_factor=2, mode="nearest"), maps.pop()), dim=1)
    for i in range(2):
        y = block(y, f"extras.{i}")
    return F.conv3d(y, state["flow.weight"], state["flow.bias"], padding=1)


def test_published_voxelmorph_gives_the_published_field() -> None:
    network, image = _voxelmorph(), torch.rand(1, 2, 8, 16, 8)
    nn.init.normal_(network.head.conv.weight)
    with torch.no_grad():
        expected = _vxm_field(to_published(network.state_dict(), "voxelmorph"), image)
        torch.testing.assert_close(network(image), expected)


def test_names_and_layouts_by_hand() -> None:
    ours = _scattered(_transmorph()).state_dict()
    theirs = to_published(ours, "transmorph")
    # Their head is twice ours, which doubles its field on the way to the image grid.
    assert torch.equal(theirs["reg_head.0.weight"], 2 * ours["head.conv.weight"])
    assert torch.equal(theirs["reg_head.0.bias"], 2 * ours["head.conv.bias"])
    # Ours are in the order 000, 001, 010, 011, 100, 101, 110, 111; theirs 000, 100, 010, 001, 110, 011, 101, 111.
    groups = ours["encoder.merges.0.norm.weight"].view(8, -1)[[0, 4, 2, 1, 6, 3, 5, 7]]
    assert torch.equal(theirs["transformer.layers.0.downsample.norm.weight"], groups.flatten())
    table = ours["encoder.stages.2.blocks.1.attn.relative_position_bias_table"]
    published = theirs["transformer.layers.2.blocks.1.attn.relative_position_bias_table"]
    assert published.shape == (3 * 5 * 3, 2) and torch.equal(published[1], table[:, 0, 0, 1])

    pyramid = _scattered(_pyramid("conv_c")).state_dict()
    published_pyramid = to_published(pyramid, "dual_stream")
    coarsest = published_pyramid["deformation_decoder.decoder.dp_blocks.0.out_block.0.bias"]
    assert torch.equal(coarsest, pyramid["decoder.steps.2.head.flow.conv.bias"])
    last = published_pyramid["feature_encoder.encoder.blocks.1.main_branch.1.0.bias"]
    assert torch.equal(last, pyramid["encoder.blocks.2.conv2.bias"])

    vfa = _scattered(_vfa()).state_dict()
    bottleneck = to_published(vfa, "vfa")["encoder.bottleneck_conv.norm2.weight"]
    assert torch.equal(bottleneck, vfa["encoder.down.2.1.norm.weight"])


def _as_saved(case: str, prefix: str = "") -> dict[str, Tensor]:
    """A state dict as the authors save it, with grids and what else goes with an image size."""
    network, build = _SMALL[case]
    state = to_published(build().state_dict(), network)
    state |= {
        "voxelmorph": {"transformer.grid": torch.zeros(1, 3, 8, 8, 8)},
        "transmorph": {
            "spatial_trans.grid": torch.zeros(1, 3, 8, 8, 8),
            "c2.0.weight": torch.zeros(4, 2, 3, 3, 3),
            "transformer.layers.0.blocks.0.attn.relative_position_index": torch.zeros(12, 12, dtype=torch.long),
        },
        "sitreg": {"_feature_coordinate_systems.0._from_voxel_coordinates": torch.zeros(4, 4)},
    }.get(network, {})
    return {prefix + name: tensor for name, tensor in state.items()}


@_cases
@pytest.mark.parametrize(
    ("container", "prefix"),
    [("state_dict", "module."), ("model_state_dict", "unet_model."), ("registration_network", ""), (None, "")],
)
def test_checkpoint_files(case: str, container: str | None, prefix: str, tmp_path: Path) -> None:
    network, build = _SMALL[case]
    state = _as_saved(case, prefix)
    extra = {"epoch": 3, "best_val_dice": np.float64(0.75), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    torch.save(state if container is None else {container: state, **extra}, tmp_path / "theirs.pth.tar")
    convert(str(tmp_path / "theirs.pth.tar"), str(tmp_path / "ours.pt"), network, _window(network))
    build().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))


@_cases
def test_names_that_are_not_known_or_missing_are_listed(case: str) -> None:
    network, _ = _SMALL[case]
    state = _as_saved(case)
    with pytest.raises(ValueError, match=r"1 weights are unknown, such as 'other\.weight'"):
        to_warpzoo(state | {"other.weight": torch.zeros(1)}, network, _window(network))
    for name in to_published(to_warpzoo(state, network, _window(network)), network):
        if name != NETWORKS[network].anchor:
            rest = {k: v for k, v in state.items() if k != name}
            with pytest.raises(ValueError, match=f"1 weights are missing, such as '{re.escape(name)}'"):
                to_warpzoo(rest, network, _window(network))


@pytest.mark.parametrize(
    ("case", "module"),
    [
        ("dual_stream conv_c", "deformation_decoder.decoder.dp_blocks.2."),
        ("dual_stream convic_mf", "feature_encoder.encoder.blocks.1."),
        ("dual_stream vfa", "deformation_decoder.decoder.dp_blocks.1."),
        ("vfa", "encoder.bottleneck_conv."),
        ("vfa", "encoder.encoder_conv.1."),
        ("sitreg", "_not_none_dense_extration_networks.2."),
        ("transmorph", "transformer.layers.1.downsample."),
        ("transmorph", "up2."),
        ("voxelmorph", "unet_model.uparm.2."),
        ("voxelmorph", "unet_model.extras.0."),
    ],
)
def test_a_module_that_is_missing_is_missed(case: str, module: str) -> None:
    network, _ = _SMALL[case]
    state = {k: v for k, v in _as_saved(case).items() if not k.startswith(module)}
    with pytest.raises(ValueError, match=rf"\d+ weights are missing, such as '{re.escape(module)}"):
        to_warpzoo(state, network, _window(network))


def test_our_own_weights_are_checked_too() -> None:
    state = _vfa().state_dict()
    with pytest.raises(ValueError, match=r"1 weights are missing, such as 'beta'"):
        to_published({k: v for k, v in state.items() if k != "beta"}, "vfa")
    with pytest.raises(ValueError, match=r"1 weights are unknown, such as 'gamma'"):
        to_published(state | {"gamma": torch.zeros(1)}, "vfa")


def test_what_is_of_another_network_is_said() -> None:
    with pytest.raises(ValueError, match=r"not a published 'vfa': it has no 'encoder\.in_norm\.weight'.*'voxelmorph'"):
        to_warpzoo(_as_saved("voxelmorph"), "vfa")
    with pytest.raises(ValueError, match=r"not a published 'sitreg'.*\['conv.weight'\], \.\.\.$"):
        to_warpzoo({"conv.weight": torch.zeros(1)}, "sitreg")
    with pytest.raises(ValueError, match=r"network must be one of .*'transmorph'.*, got 'unet'"):
        to_warpzoo({}, "unet")
    with pytest.raises(ValueError, match="network must be one of"):
        to_published({}, "unet")
    with pytest.raises(ValueError, match=r"\d+ weights are missing, such as 'decoder\.beta'"):
        to_warpzoo({"encoder.in_norm.weight": torch.zeros(1)}, "vfa")
    encoder = {k: v for k, v in _as_saved("dual_stream vfa").items() if k.startswith("feature_encoder.")}
    with pytest.raises(ValueError, match=r"has one of .* this one has 0"):
        to_warpzoo(encoder, "dual_stream")
    both = _as_saved("dual_stream conv_c") | _as_saved("dual_stream convic_c")
    with pytest.raises(ValueError, match=r"has one of .* this one has 2"):
        to_warpzoo(both, "dual_stream")


@pytest.mark.parametrize("window", [(5, 6, 7), (2, 2, 2)])
def test_windows_that_a_table_tells(window: tuple[int, ...]) -> None:
    ours = _transmorph(window).state_dict()
    back = to_warpzoo(to_published(ours, "transmorph"), "transmorph")
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_windows_that_a_table_does_not_tell() -> None:
    state = to_published(_transmorph((2, 3, 2)).state_dict(), "transmorph")
    for window in (None, (3, 3, 3)):
        with pytest.raises(ValueError, match="a bias table of 45 rows does not fit"):
            to_warpzoo(state, "transmorph", window)


def test_the_command_runs_from_the_root(tmp_path: Path, repository: Path) -> None:
    torch.save({"state_dict": _as_saved("transmorph")}, tmp_path / "theirs.pth.tar")
    command = ["bundles/dual_stream_pyramid/scripts/convert.py", str(tmp_path / "theirs.pth.tar")]
    options = [str(tmp_path / "ours.pt"), "--network", "transmorph", "--window", "2,3,2"]
    done = run_python([*command, *options], repository)
    assert done.returncode == 0, done.stderr
    assert "transmorph" in done.stderr and "weights" in done.stderr
    _transmorph().load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
