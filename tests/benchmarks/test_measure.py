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
"""The measuring itself: figures whose right value is known."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.measure import compare, format_table, median_times, peak_memory_mb, threads


def build_tensor(mebibytes: int, copies: int = 1) -> Callable[[], object]:
    """The call makes ``copies`` tensors, and drops all but the last; the input is as large as one of them."""
    given = torch.ones(mebibytes * 2**18)

    def call() -> object:
        held = [given + k for k in range(copies)]
        return held[-1]

    return call


def build_failure() -> Callable[[], object]:
    """A call that fails."""

    def call() -> object:
        raise KeyError("broken on purpose")

    return call


def test_times_are_medians_in_turns():
    order: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], object]:
        return lambda: (order.append(name), time.sleep(seconds))

    times = median_times({"a": work("a", 0.02), "b": work("b", 0.002)}, repeats=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert 20 <= times["a"] < 200 and 2 <= times["b"] < times["a"]
    with pytest.raises(ValueError, match="repeats"):
        median_times({}, repeats=0)


@pytest.mark.parametrize(("copies", "expected"), [(1, 64), (3, 192)])
def test_memory_is_what_the_call_adds(copies, expected):
    """Inputs do not count, everything alive at once does."""
    assert peak_memory_mb(build_tensor, (64, copies), warm_up=(1,)) == pytest.approx(expected, abs=8)


def test_a_failure_in_the_child_is_told():
    with pytest.raises(RuntimeError, match="broken on purpose"):
        peak_memory_mb(build_failure)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_rows_have_every_figure():
    row = compare("sum", build_tensor, build_tensor, (1,), against="itself", size="1 MB", repeats=1, memory=False)
    assert list(row)[:9] == [
        "what", "ours_ms", "theirs_ms", "ratio_time", "ours_mb", "theirs_mb", "ratio_memory", "against", "size",
    ]  # fmt: skip
    assert row["ratio_time"] == row["theirs_ms"] / row["ours_ms"]
    table = format_table([row, row]).splitlines()
    assert len(table) == 4 and table[0].startswith("| what | ours_ms |")
