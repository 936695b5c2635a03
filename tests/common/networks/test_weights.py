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

import pytest
import torch

from common.networks import SwinEncoder, interpolate_bias_tables, load_encoder_weights

_TABLE = "stages.0.blocks.0.attn.relative_position_bias_table"


def _encoder(window: int | tuple[int, ...], dims: int = 3, heads: int = 2) -> SwinEncoder:
    return SwinEncoder(dims, embed_dim=8, depths=(2, 1), num_heads=(heads, 2), window_size=window)


def test_the_same_window_is_left_alone() -> None:
    source = _encoder((2, 3, 3)).state_dict()
    fitted = interpolate_bias_tables(source, _encoder((2, 3, 3)))
    assert all(fitted[name] is tensor for name, tensor in source.items())


def test_a_table_is_stretched_linearly_from_end_to_end() -> None:
    source = _encoder((2, 2), dims=2).state_dict()
    source[_TABLE] = torch.tensor([0.0, 1.0, 4.0]).view(1, 3, 1).repeat(2, 1, 3)
    table = interpolate_bias_tables(source, _encoder((3, 2), dims=2))[_TABLE]
    assert table.shape == (2, 5, 3)
    torch.testing.assert_close(table[0, :, 0], torch.tensor([0.0, 0.5, 1.0, 2.5, 4.0]))


def test_a_window_of_one_keeps_the_middle() -> None:
    source = _encoder((2, 2), dims=2).state_dict()
    source[_TABLE] = torch.tensor([0.0, 1.0, 4.0]).view(1, 3, 1).repeat(2, 1, 3)
    table = interpolate_bias_tables(source, _encoder((1, 2), dims=2))[_TABLE]
    torch.testing.assert_close(table, torch.ones(2, 1, 3))
    back = interpolate_bias_tables({_TABLE: table}, _encoder((2, 2), dims=2))[_TABLE]
    torch.testing.assert_close(back, torch.ones(2, 3, 3))


def test_weights_move_to_another_window_and_size() -> None:
    source, target = _encoder((2, 3, 3)), _encoder(3)
    report = load_encoder_weights(target, source.state_dict())
    assert len(report.loaded) == len(target.state_dict())
    assert len(report.interpolated) == 3
    assert not report.missing
    assert not report.unexpected
    torch.testing.assert_close(target.merges[0].reduction.weight, source.merges[0].reduction.weight)
    assert all(torch.isfinite(level).all() for level in target(torch.rand(1, 2, 21, 16, 30)))


def test_the_encoder_is_found_in_a_whole_network() -> None:
    source, target = _encoder(2), _encoder(2)
    state = {f"encoder.{k}": v for k, v in source.state_dict().items()} | {"head.mean.weight": torch.zeros(1)}
    report = load_encoder_weights(target, state)
    assert not report.unexpected
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[name])


def test_what_does_not_fit_is_reported_or_refused() -> None:
    state = _encoder(2).state_dict()
    with pytest.raises(ValueError, match="cannot be fitted"):
        load_encoder_weights(_encoder(2, heads=4), state)
    wide = dict(state)
    wide["norms.0.weight"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"norms\.0\.weight has shape \(9,\), the encoder needs \(8,\)"):
        load_encoder_weights(_encoder(2), wide)
    part = dict(state)
    del part["norms.0.weight"]
    part["other"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 of \d+ encoder weights are not in the state dict"):
        load_encoder_weights(_encoder(2), part)
    report = load_encoder_weights(_encoder(2), part, strict=False)
    assert report.missing == ["norms.0.weight"]
    assert report.unexpected == ["other"]
    with pytest.raises(ValueError, match="not in the state dict"):
        load_encoder_weights(_encoder(2), {"a": torch.zeros(1)}, strict=False)


def test_a_refused_load_changes_nothing() -> None:
    target = _encoder(2)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()} | {"norms.0.weight": torch.zeros(9)}
    with pytest.raises(ValueError, match="has shape"):
        load_encoder_weights(target, state)
    for name, value in target.state_dict().items():
        torch.testing.assert_close(value, before[name])
