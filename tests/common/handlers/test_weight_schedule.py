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

import logging
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from common.handlers import LossWeightSchedule
from common.losses import Diffusion, WeightedLosses

POINTS = [[1, 0.0], [2, 40.0], [3, 20.0]]


def losses(weight: float = 0.0) -> WeightedLosses:
    terms = {
        "smoothness": {"term": Diffusion(), "inputs": ["ddf"]},
        "group": {"term": Diffusion(), "inputs": ["ddf"], "weight": weight},
    }
    return WeightedLosses(terms)


def seen_by(schedule: LossWeightSchedule, *, resume_at: int | None = None, epochs: int = 4) -> list[float]:
    """The weight in every iteration of epochs of four."""
    seen: list[float] = []
    engine = Engine(lambda e, b: seen.append(schedule.losses.weights[schedule.term]))
    schedule.attach(engine)
    if resume_at is not None:
        engine.load_state_dict({"epoch": resume_at, "max_epochs": epochs, "epoch_length": 4})
        engine.run(range(4))
    else:
        engine.run(range(4), max_epochs=epochs)
    return seen


def test_linear_between_points_in_every_iteration() -> None:
    expected = [0, 0, 0, 0, 10, 20, 30, 40, 35, 30, 25, 20, 20, 20, 20, 20]
    assert seen_by(LossWeightSchedule(losses(), "group", POINTS)) == expected


def test_a_resumed_run_goes_on_where_it_was() -> None:
    assert seen_by(LossWeightSchedule(losses(), "group", POINTS), resume_at=2) == [35, 30, 25, 20, 20, 20, 20, 20]


def test_one_point_is_a_constant() -> None:
    assert set(seen_by(LossWeightSchedule(losses(3.0), "group", [[0, 7]]))) == {7.0}


def test_a_term_that_starts_at_zero_joins_the_loss() -> None:
    weighted, values = losses(), {"ddf": torch.randn(1, 2, 5, 5)}
    one = Diffusion()(values["ddf"]).item()
    found: list[tuple[float, list[str]]] = []

    def step(engine: Engine, batch: Any) -> None:
        total, terms = weighted(values)
        found.append((total.item() / one, sorted(terms)))

    engine = Engine(step)
    LossWeightSchedule(weighted, "group", [[1, 0], [2, 4]]).attach(engine)
    engine.run(range(2), max_epochs=2)
    assert found == [
        (pytest.approx(1), ["smoothness"]),
        (pytest.approx(1), ["smoothness"]),
        (pytest.approx(3), ["group", "smoothness"]),
        (pytest.approx(5), ["group", "smoothness"]),
    ]


def test_only_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "common.handlers.weight_schedule"):
        seen_by(LossWeightSchedule(losses(), "group", POINTS), epochs=5)
    assert [record.message for record in caplog.records] == [
        "epoch 2: the weight of 'group' is now 40",
        "epoch 3: the weight of 'group' is now 20",
    ]


def test_other_ranks_are_quiet_but_follow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("common.handlers.weight_schedule.is_first_rank", lambda: False)
    with caplog.at_level(logging.INFO, "common.handlers.weight_schedule"):
        assert seen_by(LossWeightSchedule(losses(), "group", POINTS))[7] == 40
    assert not caplog.records


@pytest.mark.parametrize(
    ("term", "points", "error", "message"),
    [
        ("grup", POINTS, KeyError, r"no loss term 'grup'; there are \['group', 'smoothness'\]"),
        ("group", [], ValueError, "at least one"),
        ("group", [[1, 2, 3]], ValueError, "pairs"),
        ("group", [[1, 0], [1, 2]], ValueError, r"epochs must ascend, got \[1.0, 1.0\]"),
        ("group", [[1, -1]], ValueError, "not negative"),
        ("group", [[1, float("nan")]], ValueError, "finite"),
    ],
)
def test_impossible_schedules(term: str, points: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LossWeightSchedule(losses(), term, points)
