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

import pytest
import torch

from benchmarks import dual_stream
from bundles.dual_stream_pyramid.scripts.pyramid import DECODERS


def test_every_decoder_has_published_figures() -> None:
    assert set(dual_stream.PUBLISHED) == set(DECODERS)


@pytest.mark.parametrize("mode", ["forward", "train step"])
def test_a_pass_runs(mode: str) -> None:
    result = dual_stream.build_pass("convic_c", mode, (16, 16, 16))()
    assert isinstance(result, torch.Tensor) and bool(result.isfinite().all())
    assert result.shape == ((1, 3, 16, 16, 16) if mode == "forward" else ())


def test_a_row_says_how_much_more_the_published_code_took(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dual_stream._row("vfa", "forward", (16, 16, 16), 1, 1, 100.0, None)
    assert row["cpu_s"] > 0 and row["peak_mb"] >= row["base_mb"] > 100
    assert row["ratio_time"] == pytest.approx(100.0 / row["cpu_s"])
    assert math.isnan(row["ratio_memory"])


def test_greedy_is_quoted_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_stream.importlib.util, "find_spec", lambda name: None)
    row = dual_stream._row("greedy", "forward", (160, 192, 224), 2, 1, 81.0, 1300)
    assert (row["wall_s"], row["peak_mb"], row["ratio_time"]) == (81.0, 1300.0, 1.0)
