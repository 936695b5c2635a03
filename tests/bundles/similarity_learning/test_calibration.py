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
"""Whether a spread is judged rightly against the errors that it is to predict."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bundles.similarity_learning.scripts.calibration import (
    Case,
    area_above_oracle,
    confidence_bins,
    displacement_case,
    expected_calibration_error,
    label_case,
    quantile_bins,
    sparsification,
    spearman,
)

FRACTIONS = torch.linspace(0, 0.95, 20)


def test_rank_correlation_is_scipys_with_and_without_ties() -> None:
    a, b = torch.rand(500), torch.rand(500)
    b = b + a
    for x, y in ((a, b), ((10 * a).round(), (3 * b).round()), (a, (b > 1).float())):
        assert spearman(x, y) == pytest.approx(spearmanr(x.numpy(), y.numpy()).statistic, abs=1e-6)
    assert spearman(a, -a.exp()) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(500))) and math.isnan(spearman(a[:1], b[:1]))


def test_what_is_left_when_the_worst_are_taken_out() -> None:
    error = torch.tensor([4.0, 3, 2, 1])
    fractions = torch.tensor([0.0, 0.25, 0.5, 0.75])
    perfect = sparsification(torch.tensor([9.0, 8, 7, 6]), error, fractions)
    assert perfect.tolist() == pytest.approx([1, 2 / 2.5, 1.5 / 2.5, 1 / 2.5])
    worst = sparsification(torch.tensor([1.0, 2, 3, 4]), error, fractions)
    assert worst.tolist() == pytest.approx([1, 3 / 2.5, 3.5 / 2.5, 4 / 2.5])
    assert area_above_oracle(perfect, perfect, fractions) == 0 < area_above_oracle(worst, perfect, fractions)


def test_voxels_of_equal_uncertainty_go_in_no_order() -> None:
    """Most voxels have a label without doubt: which of them is looked at first must not matter."""
    error = torch.tensor([0.0, 1, 0, 1, 1])
    uncertainty = torch.tensor([0.0, 0, 0, 0, 5])
    curve = sparsification(uncertainty, error, torch.tensor([0.0, 0.2, 0.6]))
    assert curve.tolist() == pytest.approx([1, 0.5 / 0.6, 0.5 / 0.6])
    shuffled = torch.randperm(5)
    again = sparsification(uncertainty[shuffled], error[shuffled], torch.tensor([0.0, 0.2, 0.6]))
    assert again.tolist() == pytest.approx(curve.tolist())
    assert sparsification(torch.ones(50), torch.rand(50), FRACTIONS).tolist() == pytest.approx([1] * 20)
    assert sparsification(torch.rand(5), torch.zeros(5), FRACTIONS).isnan().all()


def test_errors_of_the_predicted_size_lie_on_the_diagonal() -> None:
    uncertainty = 0.1 + torch.rand(60_000)
    error = (uncertainty * torch.randn(60_000)).abs()
    bins = quantile_bins(uncertainty, error, 10)
    assert bins[:, 2].tolist() == [6000] * 10
    std, rmse = bins[:, 0].div(bins[:, 2]).sqrt(), bins[:, 1].div(bins[:, 2]).sqrt()
    assert (std.diff() > 0).all() and torch.allclose(std, rmse, rtol=0.05)
    assert torch.allclose(quantile_bins(uncertainty, 3 * error, 10)[:, 1], 9 * bins[:, 1])
    assert quantile_bins(uncertainty[:3], error[:3], 10)[:, 2].sum() == 3


def coin(share: float, voxels: int = 40_000) -> Case:
    """Voxels to which a label comes with a probability of 0.7, and is there in a ``share`` of them."""
    codes = (torch.rand(1, 1, voxels, 1) >= share).long()
    shares = torch.full((1, 1, voxels, 1), 0.7)
    return Case(shares, shares, torch.ones_like(shares, dtype=torch.bool), shares, codes)


def test_calibration_error_is_the_distance_of_probability_and_frequency() -> None:
    assert expected_calibration_error(confidence_bins(coin(0.7), 0, 10)) == pytest.approx(0, abs=0.01)
    bins = confidence_bins(coin(0.5), 0, 10)
    assert expected_calibration_error(bins) == pytest.approx(0.2, abs=0.01)
    assert bins[:, 2].nonzero().flatten().tolist() == [7] or bins[:, 2].nonzero().flatten().tolist() == [6]
    assert math.isnan(expected_calibration_error(torch.zeros(10, 3)))


def test_the_background_can_be_the_most_probable() -> None:
    shares = torch.tensor([0.1, 0.6, 1.0, 0.0]).view(1, 1, 2, 2)
    codes = torch.tensor([1, 0, 0, 0]).view(1, 1, 2, 2)  # 1 is background: of the four, the last is wrong
    case = Case(shares, shares, torch.ones(1, 1, 2, 2, dtype=torch.bool), shares, codes)
    bins = confidence_bins(case, 0, 10)
    assert bins[:, 1].sum() == 3 and bins[9].tolist() == pytest.approx([2.9, 2, 3]) and bins[:, 2].sum() == 4


def values(size: tuple[int, ...] = (8, 9)) -> dict[str, torch.Tensor]:
    dims = len(size)
    ddf = torch.zeros(1, dims, *size)
    label = torch.zeros(1, 1, *size, dtype=torch.int32)
    label[:, :, 2:5] = 1
    samples = torch.zeros(1, 4, dims, *size)
    samples[:, 0, 0], samples[:, 1, 0] = 1.0, -1.0
    return {"ddf": ddf, "ddf_samples": samples, "moving_label": label, "fixed_label": label.clone()}


@pytest.mark.parametrize("size", [(8, 9), (8, 9, 3)])
def test_labels_are_judged_where_one_may_be(size: tuple[int, ...]) -> None:
    given = values(size)
    given["fixed_label"] = given["fixed_label"].roll(1, 2)  # rows 3 to 5
    case = label_case(given, [1])
    assert case is not None
    region, error = (x.flatten(3)[0, 0, :, 0] for x in (case.region, case.error))
    assert region.nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    assert error.nonzero().flatten().tolist() == [2, 5]
    uncertainty, wrong = case.of(0)
    assert len(uncertainty) == len(wrong) == 5 * int(np.prod(size[1:]))
    assert label_case({**given, "fixed_label": None}, [1]) is None and label_case(given, []) is None


def test_displacements_are_judged_inside_the_mask() -> None:
    given = values()
    true = torch.zeros(1, 2, 8, 9)
    true[:, 0], true[:, 1, 4:] = 3.0, 4.0
    assert displacement_case(given) is None
    case = displacement_case({**given, "true_ddf": true})
    assert case is not None and case.region.all()
    assert case.error[0, 0, :, 0].tolist() == [3] * 4 + [5] * 4
    assert torch.allclose(case.uncertainty, torch.tensor(math.sqrt(0.5)))
    mask = torch.zeros(1, 1, 8, 9, dtype=torch.int32)
    mask[:, :, 6:] = 1
    inside = displacement_case({**given, "true_ddf": true, "fixed_mask": mask})
    assert inside is not None and inside.of(0)[1].tolist() == [5.0] * 18
