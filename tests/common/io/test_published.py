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

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.io.published import (
    infer_window,
    is_buffer,
    permute_merge,
    read_checkpoint,
    rename,
    swin_to_published,
    swin_to_warpzoo,
)
from common.networks import SwinEncoder


def test_there_and_back_is_the_identity() -> None:
    ours = SwinEncoder(embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=(2, 3, 4)).state_dict()
    theirs = swin_to_published(ours)
    assert theirs["layers.0.blocks.1.attn.relative_position_bias_table"].shape == (3 * 5 * 7, 2)
    back = swin_to_warpzoo(theirs, (2, 3, 4))
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())


def test_tables_are_row_major_and_merges_change_their_order() -> None:
    table = torch.arange(90.0).view(45, 2)  # published: (offsets, heads)
    theirs = {"layers.0.blocks.0.attn.relative_position_bias_table": table, "layers.0.downsample.norm.weight": _eight()}
    ours = swin_to_warpzoo(theirs, (2, 2, 3))
    bias = ours["stages.0.blocks.0.attn.relative_position_bias_table"]
    assert bias.shape == (2, 3, 3, 5)
    assert bias[1, 2, 0, 3] == table[2 * 15 + 0 * 5 + 3, 1]
    # Theirs are 000, 100, 010, 001, 110, 011, 101, 111 (axis by axis); ours count in binary.
    assert ours["merges.0.norm.weight"].tolist() == [0, 3, 2, 5, 1, 6, 4, 7]
    assert permute_merge(ours["merges.0.norm.weight"], to_published=True).tolist() == _eight().tolist()


def _eight() -> torch.Tensor:
    return torch.arange(8.0)


def test_unknown_names_and_windows_that_do_not_fit_are_refused() -> None:
    state = swin_to_published(SwinEncoder(embed_dim=8, depths=(1,), num_heads=(2,), window_size=2).state_dict())
    with pytest.raises(ValueError, match="27 rows; window \\(2, 3, 3\\) needs 75"):
        swin_to_warpzoo(state, (2, 3, 3))
    with pytest.raises(ValueError, match="is called 'pos_drop'"):
        swin_to_warpzoo({"pos_drop": torch.zeros(1)}, (2, 2, 2))
    with pytest.raises(ValueError, match="'other' has no published name"):
        swin_to_published({"other": torch.zeros(1)})


def test_buffers_are_known_and_dropped() -> None:
    assert swin_to_warpzoo({"layers.0.blocks.0.attn.relative_position_index": torch.zeros(8, 8)}, (2, 2, 2)) == {}
    assert is_buffer("spatial_trans.grid") and is_buffer("grid") and not is_buffer("my_grid.weight")


@pytest.mark.parametrize(
    ("rows", "grids", "window"),
    [(9 * 11 * 13, [(80, 96, 112)], (5, 6, 7)), (9 * 11 * 13, [(160, 192, 224)], (5, 6, 7)), (27, [], (2, 2, 2))],
)
def test_the_window_is_told_by_the_size_of_a_grid(rows: int, grids: list[tuple[int, ...]], window: tuple[int]) -> None:
    state = {f"warp{i}.grid": torch.zeros(1, 3, *size) for i, size in enumerate(grids)}
    assert infer_window({"a.relative_position_bias_table": torch.zeros(rows, 1), **state}) == window


def test_a_window_that_nothing_tells_is_asked_for() -> None:
    with pytest.raises(ValueError, match="45 rows do not tell the window: give it"):
        infer_window({"a.relative_position_bias_table": torch.zeros(45, 1)})
    with pytest.raises(ValueError, match="not a Swin transformer"):
        infer_window({"a.weight": torch.zeros(45, 1)})


def test_renaming_takes_the_first_row_that_fits() -> None:
    table = (("a{n}.b.{rest}", "{rest}.of.{n}"), ("a{n}.{rest}", "other"))
    assert rename("a12.b.c.d", table) == "c.d.of.12"
    assert rename("a12.c", table) == "other"
    assert rename("ax.b.c", table) is None
    assert rename("a1xbxc", table) is None  # a dot is a dot


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "registration_network", None])
def test_state_dicts_are_found_under_any_known_key(tmp_path: Path, key: str | None) -> None:
    state = {"a": torch.ones(2)}
    torch.save(state if key is None else {key: state, "score": np.float64(0.5)}, tmp_path / "file.pt")
    assert read_checkpoint(tmp_path / "file.pt")["a"].tolist() == [1, 1]


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a checkpoint was unpickled",))


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    zipped, bare = tmp_path / "zipped.pth.tar", tmp_path / "bare.pkl"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": _Bomb()}, zipped)
    bare.write_bytes(pickle.dumps({"state_dict": _Bomb()}, protocol=2))
    for path in (zipped, bare):
        with pytest.raises(ValueError, match="nothing else is unpickled"):
            read_checkpoint(path)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="no torch checkpoint"):
        read_checkpoint(tmp_path / "text.pth")
    for content in ({"epoch": 1}, {"state_dict": 3}, [torch.zeros(1)], {}):
        torch.save(content, tmp_path / "empty.pth")
        with pytest.raises(ValueError, match="neither a state dict nor one under 'state_dict' or 'model_state_dict'"):
            read_checkpoint(tmp_path / "empty.pth")
