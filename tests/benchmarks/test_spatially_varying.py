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
"""The benchmark's published form computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import spatially_varying
from benchmarks.measure import cost_in_this_process
from benchmarks.spatially_varying import Case, PublishedForm, measure, published_loss
from bundles.spatially_varying_reg.scripts.hyperpriors import BetaHyperprior, SpatiallyWeightedDiffusion
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR
from common.losses import LNCC
from common.spatial import warp

_TINY: dict[str, Any] = {"embed_dim": 8, "depths": (1, 2, 1), "num_heads": (2, 2, 2), "steps": 2}


def test_the_published_form_gives_the_same_fields_and_loss() -> None:
    network = TransMorphSPR(**spatially_varying._PUBLISHED, **_TINY).eval()
    for step in network.time_steps.steps:
        torch.nn.init.normal_(step.head.conv.weight, std=0.1)
    image = torch.rand(1, 2, 32, 32, 32)
    with torch.no_grad():
        theirs = PublishedForm(network)(image)
        ours = network.fields(image)
    assert ours["ddf"].abs().max() > 0.5
    for name in ("ddf", "weight_map"):
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-4, rtol=1e-4)
    moved = warp(image[:, :1], ours["ddf"], padding="zeros")
    smoothness = SpatiallyWeightedDiffusion(3.35, weight_at="upper")(ours["ddf"], ours["weight_map"])
    expected = LNCC(form="sum")(moved, image[:, 1:]) + BetaHyperprior(1.175)(ours["weight_map"]) + smoothness
    torch.testing.assert_close(published_loss(theirs, image), expected, atol=1e-4, rtol=1e-4)


def test_rows_hold_both_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatially_varying, "cost_in_fresh_process", cost_in_this_process)
    rows = measure((Case(32, True, _TINY), Case(32, False, _TINY)), repeats=1)
    assert [row["what"] for row in rows[3:5]] == ["training step, ours, default settings", "field alone, published"]
    assert rows[0]["cpu_over_published"] == rows[4]["cpu_over_published"] == 1.0
    assert all(row["cpu_s"] > 0 and row["mb"] >= 0 for row in rows)
