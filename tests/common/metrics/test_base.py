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
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

from common.metrics import DiceScore, RegistrationMetric
from common.metrics.base import check_definition, nan_mean, per_item_spacing


class Halves(RegistrationMetric):
    """Half of what it is given."""

    columns = ("a", "b")

    def _compute_tensor(self, values: Tensor) -> Tensor:  # type: ignore[override]
        return values / 2


def test_rows_of_all_calls_are_kept_until_reset() -> None:
    metric = Halves()
    first = metric(torch.tensor([[2.0, 4.0]]))
    metric(torch.tensor([[6.0, 8.0], [10.0, math.nan]]))
    assert first.tolist() == [[1.0, 2.0]]
    assert torch.equal(metric.get_buffer()[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    # Items weigh the same: (1.5 + 3.5 + 5) / 3, not the mean of the five numbers, which is 3.
    assert float(metric.aggregate()) == pytest.approx(10 / 3)
    metric.reset()
    assert metric.get_buffer() is None and math.isnan(float(metric.aggregate()))


def test_items_without_a_value_do_not_count() -> None:
    metric = Halves()
    metric(torch.tensor([[math.nan, math.nan], [2.0, math.nan]]))
    assert float(metric.aggregate()) == 1.0


def test_aggregating_does_not_change_the_rows() -> None:
    metric = Halves()
    metric(torch.tensor([[2.0, math.nan]]))
    metric.aggregate()
    assert math.isnan(float(metric.get_buffer()[0, 1]))


def test_lists_of_decollated_tensors_are_a_batch() -> None:
    label = torch.tensor([[[1, 1], [0, 0]]])
    assert DiceScore([1])([label, label], [label, 1 - label]).tolist() == [[1.0], [0.0]]


def test_works_in_monai_handlers() -> None:
    assert isinstance(Halves(), CumulativeIterationMetric)
    IgniteMetricHandler(metric_fn=Halves())


def test_no_graph_is_kept() -> None:
    assert not Halves()(torch.ones(1, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        (None, [(1.0, 1.0)] * 2),
        (2, [(2.0, 2.0)] * 2),
        ((1.0, 3.0), [(1.0, 3.0)] * 2),
        ([[1.0, 2.0], [3.0, 4.0]], [(1.0, 2.0), (3.0, 4.0)]),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [(1.0, 2.0), (3.0, 4.0)]),
    ],
)
def test_spacing_forms(spacing: object, expected: list[tuple[float, float]]) -> None:
    assert per_item_spacing(spacing, 2, 2) == expected


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 3.0), 0.0, (1.0, -1.0), math.inf, [[1.0, 1.0]] * 3])
def test_spacing_that_does_not_fit(spacing: object) -> None:
    with pytest.raises(ValueError, match="spacing"):
        per_item_spacing(spacing, 2, 2)


def test_nan_mean_keeps_infinities() -> None:
    values = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 1.0, 1.0], [math.nan, math.nan, math.nan]])
    means = nan_mean(values, 1)
    assert means[:2].tolist() == [2.0, math.inf] and math.isnan(float(means[2]))


def test_unknown_definition() -> None:
    with pytest.raises(ValueError, match="'standard', 'learn2reg'"):
        check_definition("challenge")
