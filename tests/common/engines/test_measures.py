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
from typing import Any

import pytest
import torch

from common.engines import PairValues, standard_measures


def values(moving_label: torch.Tensor, ddf: torch.Tensor, spacing: float = 1.0) -> PairValues:
    """A pair whose fixed label 1 is the slab of rows 4 and 5."""
    fixed_label = torch.zeros(1, 1, 12, 10, dtype=torch.int32)
    fixed_label[:, :, 4:6] = 1
    affine = torch.diag(torch.tensor([spacing, 1.0, 1.0], dtype=torch.float64))[None]
    batch: dict[str, Any] = {"moving_label": moving_label, "fixed_label": fixed_label, "fixed_affine": affine}
    return PairValues({**batch, "moving": moving_label.float(), "fixed": fixed_label.float()}, {"ddf": ddf})


def slab(start: int) -> torch.Tensor:
    label = torch.zeros(1, 1, 12, 10, dtype=torch.int32)
    label[:, :, start : start + 2] = 1
    return label


def test_names_depend_on_what_there_is() -> None:
    assert set(standard_measures().metrics) == {"similarity_before", "similarity", "ndv", "folds", "sdlogj"}
    more = set(standard_measures([1], surface=True, true_field=True).metrics)
    assert {"dice", "dice_before", "hd95", "hd95_before", "asd", "asd_before", "epe"} <= more


def test_a_label_that_warping_loses_scores_zero() -> None:
    away = torch.zeros(1, 2, 12, 10)
    away[:, 0] = -20.0  # everything reads the first row, which is background
    measured = standard_measures([1, 2])(values(slab(4), away))
    assert measured["dice_before"][0, 0] == 1 and measured["dice"][0, 0] == 0
    assert math.isnan(measured["dice"][0, 1]), "a label that neither image has"


@pytest.mark.parametrize("spacing", [1.0, 2.5])
def test_surface_distances_are_in_the_scans_millimetres(spacing: float) -> None:
    measures = standard_measures([1], surface=True, spacing="fixed_spacing")
    measured = measures(values(slab(7), torch.zeros(1, 2, 12, 10), spacing))
    assert measured["hd95"].item() == pytest.approx(3 * spacing)
    assert measures.aggregate()["hd95_before"] == pytest.approx(3 * spacing)
