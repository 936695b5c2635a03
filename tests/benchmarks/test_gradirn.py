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
"""The benchmark's plain network is the same one."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gradirn
from benchmarks.gradirn import Case, PlainGraDIRN, measure
from benchmarks.measure import cost_in_this_process
from bundles.gradirn.scripts.network import GraDIRN


def test_the_plain_network_gives_the_same_field() -> None:
    plain, ours = PlainGraDIRN(2).double(), GraDIRN(2).double()
    for regulariser, steps in zip(plain.regularisers, ours.levels, strict=True):
        convs = [layer for layer in regulariser if hasattr(layer, "weight")]
        torch.nn.init.normal_(convs[-1].weight, std=0.05)
        for conv, own in zip(convs, [*steps[0].regulariser.hidden, steps[0].regulariser.last], strict=True):
            own.load_state_dict(conv.state_dict())
    # Off whole voxels, where slopes have two values. A step is compared: between levels the published field is doubled,
    # ours resampled exactly.
    image = torch.rand(1, 2, 16, 20, dtype=torch.float64)
    ddf = 0.3 + 0.1 * torch.rand(1, 2, 16, 20, dtype=torch.float64)
    grid = torch.stack(
        torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in (16, 20)), indexing="ij")
    )
    moving, fixed = image.chunk(2, dim=1)
    gradient, moved = plain._gradient(ddf, moving, fixed, grid)
    expected = ddf - 0.5 * gradient - plain.regularisers[2](torch.cat((ddf, fixed, moved), dim=1))
    torch.testing.assert_close(ours.levels[2][0](ddf, moving, fixed), expected, atol=1e-7, rtol=0)


def test_rows_hold_both_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradirn, "cost_in_fresh_process", cost_in_this_process)
    case = Case(2, 16, 1, train=True, seconds=0.5, megabytes=100.0)
    rows = measure((case,), repeats=1)
    assert [row["what"] for row in rows] == [
        "training step, plain",
        "training step, ours",
        "training step, ours, steps checkpointed",
        "training step, ours, gradient steps alone",
    ]
    assert rows[0]["cpu_over_plain"] == 1.0
    for row in rows:
        assert row["cpu_s"] > 0
        assert row["cpu_over_published"] == row["cpu_s"] / 0.5 and row["mb_over_published"] == row["mb"] / 100
