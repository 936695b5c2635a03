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
"""Each validation pair has its own point of the trained range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine

from bundles.spatially_varying_reg.scripts.hyper import HyperTransMorphSPR
from bundles.spatially_varying_reg.scripts.spread import SpreadConditions


def network(**options: Any) -> HyperTransMorphSPR:
    small: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1, 1), "num_heads": (2, 2, 2), "window_size": 2, "steps": 1}
    return HyperTransMorphSPR(2, rank=1, code_channels=4, w_range=(1.0, 3.0), **small, **options)


def met(hyper: HyperTransMorphSPR, pairs: int, epochs: int = 1, **fixed: float) -> torch.Tensor:
    """The hyper-parameters that an evaluator's pairs meet, (pairs, 2)."""
    hyper.eval()
    found: list[torch.Tensor] = []
    engine = Engine(lambda e, batch: found.append(hyper.conditioning.values(1, sample=False)[0]))
    SpreadConditions(hyper, **fixed).attach(engine)
    engine.run(range(pairs), max_epochs=epochs)
    return torch.stack(found)


def test_pairs_cover_the_range_evenly_and_alike_in_each_epoch() -> None:
    points = met(network(), 64, epochs=2)
    assert torch.equal(points[:64], points[64:])
    assert points[0].tolist() == pytest.approx([1.1, 2.0])
    unit = (points[:64] - torch.tensor([1.0, 1.0])) / torch.tensor([0.2, 2.0])
    assert unit.min() >= 0 and unit.max() <= 1
    counts = torch.histogramdd(unit, bins=[4, 4], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert counts.min() >= 2 and counts.max() <= 5, "four in each sixteenth, more or less"


def test_few_pairs_have_the_mean_of_the_range() -> None:
    assert torch.allclose(met(network(), 8).mean(0), torch.tensor([1.1, 2.0]), atol=0.2)


def test_what_is_fixed_stays_and_the_rest_is_open_again_afterwards() -> None:
    hyper = network(prior="gaussian", w=2.5)
    points = met(hyper, 5, w=2.5)
    assert set(points[:, 1].tolist()) == {2.5} and len(set(points[:, 0].tolist())) == 5
    drawn = torch.cat([hyper.conditioning.values(1, sample=True) for _ in range(5)])
    assert set(drawn[:, 1].tolist()) == {2.5} and len(set(drawn[:, 0].tolist())) == 5


def test_ranks_have_the_points_of_their_own_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = met(network(), 6)
    for name, value in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        parts.append(met(network(), 3))
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone)
