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

from common.metrics import Reported


def test_numbers_are_taken_as_they_are() -> None:
    metric = Reported()
    assert metric(torch.tensor([[0.25], [0.5]])).tolist() == [[0.25], [0.5]]
    assert metric(torch.tensor([1.5])).tolist() == [[1.5]]
    assert float(metric.aggregate()) == pytest.approx(0.75)


def test_several_of_an_item_are_averaged() -> None:
    iterations = torch.tensor([[[3, 5], [2, 2]], [[1, 1], [1, 1]]])
    assert Reported()(iterations).tolist() == [[3.0], [1.0]]
    assert Reported()(torch.tensor([[2.0, math.nan]])).tolist() == [[2.0]]


def test_one_number_for_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="single number"):
        Reported()(torch.tensor(1.0))
