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
"""Where q(v) is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.store import PosteriorStore
from common.handlers import load_checkpoint, save_checkpoint

_KEPT = ("memory", "disk")
_A, _B, _C = ("a", "atlas"), ("b", "atlas"), ("c", "atlas")


def make(where: str, folder: Path, **options: Any) -> PosteriorStore:
    return PosteriorStore(where, folder / "q" if where == "disk" else None, **options)


def posterior(batch: int, value: float = 0.0, size: tuple[int, ...] = (3, 4), rank: int = 2) -> LowRankGaussian:
    shape = (batch, len(size), *size)
    return LowRankGaussian(torch.randn(shape) + value, torch.randn(shape), torch.randn(batch, rank, *shape[1:]))


def same(one: LowRankGaussian, other: LowRankGaussian) -> bool:
    return all(torch.equal(tensor, other.state()[name]) for name, tensor in one.state().items())


@pytest.mark.parametrize("size", [(3, 4), (3, 2, 5)])
@pytest.mark.parametrize("where", _KEPT)
def test_pairs_come_back_in_any_order_and_batch(where: str, size: tuple[int, ...], tmp_path: Path) -> None:
    store, batch = make(where, tmp_path), posterior(2, size=size)
    assert _A not in store and len(store) == 0
    store.put([_A, _B], batch)
    store.put([_C], posterior(1, size=size))
    assert _A in store and ("atlas", "a") not in store and len(store) == 3
    found = store.get([_C, _A])
    assert found.mean.shape == (2, len(size), *size) and found.factors.shape == (2, 2, len(size), *size)
    assert torch.equal(found.mean[1], batch.mean[0]) and torch.equal(found.factors[1], batch.factors[0])


@pytest.mark.parametrize("where", _KEPT)
def test_what_was_stored_is_a_copy(where: str, tmp_path: Path) -> None:
    store, batch = make(where, tmp_path), posterior(1)
    before = LowRankGaussian.from_state(batch.state())
    store.put([_A], batch)
    with torch.no_grad():
        batch.mean.add_(1)
        store.get([_A]).log_var.add_(1)
    assert same(store.get([_A]), before)


@pytest.mark.parametrize("where", _KEPT)
def test_half_precision_is_close_and_comes_back_in_float32(where: str, tmp_path: Path, device: torch.device) -> None:
    store, batch = make(where, tmp_path, dtype="float16"), posterior(1)
    store.put([_A], batch.to(device))
    found = store.get([_A], device)
    assert found.mean.dtype == torch.float32 and found.mean.device.type == device.type
    for name, tensor in found.state().items():
        assert torch.allclose(tensor, batch.state()[name], rtol=2**-10)
    assert not same(found, batch)


def test_without_a_place_every_visit_starts_afresh() -> None:
    store = PosteriorStore("none")
    store.put([_A], posterior(1))
    store.synchronise()
    assert _A not in store and store.state_dict()["pairs"] == {}


@pytest.mark.parametrize("where", _KEPT)
def test_a_run_that_died_goes_on_from_what_its_last_checkpoint_knew(where: str, tmp_path: Path) -> None:
    store, first = make(where, tmp_path), posterior(2)
    store.put([_A, _B], first)
    store.synchronise()
    save_checkpoint(tmp_path / "last.pt", {"store": store.state_dict()})
    store.put([_A, _C], posterior(2, 5.0))  # the next epoch, whose end is never reached
    assert not torch.equal(store.get([_A]).mean, first.mean[:1])

    again = make(where, tmp_path)
    again.load_state_dict(load_checkpoint(tmp_path / "last.pt")["store"])
    assert same(again.get([_A, _B]), first) and _C not in again

    again.put([_A], posterior(1, 9.0))  # and dies again
    once_more = make(where, tmp_path)
    once_more.load_state_dict(load_checkpoint(tmp_path / "last.pt")["store"])
    assert same(once_more.get([_A, _B]), first)


def test_a_checkpoint_of_every_second_epoch_keeps_its_files(tmp_path: Path) -> None:
    store, first = make("disk", tmp_path), posterior(1)
    store.put([_A], first)
    store.synchronise()
    save_checkpoint(tmp_path / "last.pt", {"store": store.state_dict()})
    for _ in range(3):
        store.put([_A], posterior(1))
        store.synchronise()
    store.tidy()
    assert len(list((tmp_path / "q").iterdir())) == 2  # the checkpoint's and the newest
    again = make("disk", tmp_path)
    again.load_state_dict(load_checkpoint(tmp_path / "last.pt")["store"])
    assert same(again.get([_A]), first)


def test_old_files_go_once_no_checkpoint_needs_them(tmp_path: Path) -> None:
    store = make("disk", tmp_path)
    for _ in range(4):
        store.put([_A, _B], posterior(2))
        assert len(list((tmp_path / "q").iterdir())) <= 4
        store.synchronise()
        store.state_dict()
    store.tidy()
    assert len(list((tmp_path / "q").iterdir())) == 2


def test_files_of_an_earlier_run_are_not_written_over_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    old, first = make("disk", tmp_path), posterior(1)
    old.put([_A], first)
    old.synchronise()
    checkpoint = old.state_dict()
    fresh = make("disk", tmp_path)
    assert _A not in fresh
    fresh.put([_A], posterior(1))
    again = make("disk", tmp_path)
    again.load_state_dict(checkpoint)
    assert same(again.get([_A]), first)


def test_ids_that_make_no_file_name_or_nearly_the_same(tmp_path: Path) -> None:
    store = make("disk", tmp_path)
    pairs = [("../../x/y", "f"), ("..-..-x-y", "f"), ("é" * 300, "f"), ("", "f"), ("a", "b_to_c"), ("a_to_b", "c")]
    batch = posterior(len(pairs))
    store.put(pairs, batch)
    assert same(store.get(pairs), batch)
    assert len(list((tmp_path / "q").iterdir())) == len(pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_bad_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one of \['memory', 'disk', 'none'\], got 'ram'"):
        PosteriorStore("ram")
    with pytest.raises(ValueError, match=r"float16.*'bf16'"):
        PosteriorStore(dtype="bf16")
    with pytest.raises(ValueError, match="needs a folder"):
        PosteriorStore("disk")
    store = make("disk", tmp_path)
    with pytest.raises(ValueError, match="2 pairs came with a q\\(v\\) of 1"):
        store.put([_A, _B], posterior(1))
    with pytest.raises(KeyError, match="atlas"):
        store.get([_A])
    store.put([_A], posterior(1))
    store.put([_B], posterior(1, size=(4, 4)))
    with pytest.raises(ValueError, match="different sizes"):
        store.get([_A, _B])
    store.synchronise()
    checkpoint = store.state_dict()
    with pytest.raises(ValueError, match="'disk', this one in 'memory'"):
        PosteriorStore().load_state_dict(checkpoint)
    next((tmp_path / "q").iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="1 files of q"):
        make("disk", tmp_path).load_state_dict(checkpoint)
