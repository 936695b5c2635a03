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

from typing import Any

import pytest
import torch

from common.metrics import DiceScore, MetricCollection, TargetRegistrationError

LABEL = torch.tensor([[[[1, 1, 2, 2]]], [[[1, 0, 2, 0]]]])


def entries(**more: Any) -> dict[str, Any]:
    return {"dice": {"metric": DiceScore([1, 2]), "inputs": ["moved_label", "fixed_label"], **more}}


def test_each_metric_gets_what_it_asks_for() -> None:
    before = {"metric": DiceScore([1, 2]), "inputs": {"fixed_label": "fixed_label", "moved_label": "moving_label"}}
    metrics = MetricCollection({**entries(), "dice_before": before})
    values = {"moved_label": LABEL, "fixed_label": LABEL, "moving_label": LABEL.flip(-1)}
    measured = metrics(values)
    assert measured["dice"].tolist() == [[1.0, 1.0]] * 2 and measured["dice_before"].tolist() == [[0.0, 0.0]] * 2
    assert metrics.aggregate() == {"dice": 1.0, "dice_before": 0.0}
    assert metrics.columns == {"dice": ("1", "2"), "dice_before": ("1", "2")}
    metrics.reset()
    assert metrics.metrics["dice"].get_buffer() is None


def test_missing_inputs_are_named() -> None:
    with pytest.raises(KeyError, match=r"'dice' needs \['moved_label'\]; there are \['fixed_label'\]"):
        MetricCollection(entries())({"fixed_label": LABEL})


def test_optional_metrics_are_left_out() -> None:
    assert MetricCollection(entries(required=False))({"fixed_label": LABEL, "moved_label": None}) == {}


def test_inputs_by_argument() -> None:
    inputs = {"points": "p", "target": "q", "ddf": "ddf"}
    metrics = MetricCollection({"tre": {"metric": TargetRegistrationError(), "inputs": inputs}})
    values = {"p": torch.ones(1, 1, 2), "q": torch.ones(1, 1, 2), "ddf": torch.full((1, 2, 4, 4), 3.0)}
    assert float(metrics(values)["tre"]) == pytest.approx(3 * 2**0.5)


@pytest.mark.parametrize("entry", [{"metric": DiceScore([1])}, {"metric": 1, "inputs": [], "weight": 2}])
def test_bad_entries(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'dice' needs the keys"):
        MetricCollection({"dice": entry})
