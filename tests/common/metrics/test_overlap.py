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

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice
from torch.nn.functional import one_hot

from common.metrics import DiceScore


def cube(shape: tuple[int, ...], start: int, stop: int, label: int = 1) -> torch.Tensor:
    """A label map (1, 1, \\*S) with one cube from ``start`` to ``stop`` along every axis."""
    volume = torch.zeros(shape, dtype=torch.int16)
    volume[(slice(start, stop),) * len(shape)] = label
    return volume[None, None]


@pytest.mark.parametrize(("dims", "expected"), [(2, 2 * 4 / (16 + 16)), (3, 2 * 8 / (64 + 64))])
def test_two_cubes(dims: int, expected: float, device: torch.device) -> None:
    shape = (9, 8, 7)[:dims]
    score = DiceScore([1])(cube(shape, 0, 4).to(device), cube(shape, 2, 6).to(device))
    assert score.device.type == device.type and score.dtype == torch.float32
    assert score.cpu().tolist() == [[pytest.approx(expected)]]


def test_items_and_labels_are_separate() -> None:
    one, two = cube((6, 6), 0, 2, 1), cube((6, 6), 3, 5, 2)
    moved = torch.cat([one + two, one])
    fixed = torch.cat([one, one + two])
    score = DiceScore([2, 1])(moved, fixed)
    assert torch.isnan(score[:, 0]).all() and score[:, 1].tolist() == [1.0, 1.0]


def test_absent_labels_are_nan_and_disjoint_ones_zero() -> None:
    moved = torch.tensor([[[[1, 1, 2, 0, 0]]]])
    fixed = torch.tensor([[[[0, 0, 0, 1, 3]]]])
    score = DiceScore([1, 2, 3, 4])(moved, fixed)[0]
    assert float(score[0]) == 0.0 and torch.isnan(score[1:]).all()


def test_empty_fixed_and_empty_everything() -> None:
    empty, full = torch.zeros(1, 1, 4, 4, 4, dtype=torch.uint8), cube((4, 4, 4), 1, 3).byte()
    metric = DiceScore([1])
    assert torch.isnan(metric(full, empty)).all() and torch.isnan(metric(empty, empty)).all()
    assert torch.isnan(metric.aggregate())


def test_a_label_that_warping_lost_scores_zero() -> None:
    moving, moved = torch.tensor([[[[1, 2, 0]]]]), torch.tensor([[[[0, 2, 0]]]])
    fixed = torch.tensor([[[[1, 2, 0]]]])
    assert torch.isnan(DiceScore([1])(moved, fixed)).all()
    assert DiceScore([1, 2, 3])(moved, fixed, moving)[0, :2].tolist() == [0.0, 1.0]
    # A label that was never there is no fault of the warping, and one outside fixed cannot be matched.
    assert torch.isnan(DiceScore([3])(moved, fixed, moving)).all()


def test_background_counts_when_asked_for() -> None:
    moved, fixed = torch.tensor([[[[0, 0, 1, 1]]]]), torch.tensor([[[[0, 1, 1, 0]]]])
    assert DiceScore([0, 1])(moved, fixed).tolist() == [[0.5, 0.5]]


def test_labels_may_be_floating_point() -> None:
    label = cube((5, 5), 1, 3, 300).float()
    assert DiceScore([300])(label, label).tolist() == [[1.0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_agrees_with_monai(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    moved, fixed = (torch.randint(0, 4, (2, 1, 5, 4, 3), generator=generator) for _ in range(2))
    ours = DiceScore([1, 2, 3])(moved, fixed)
    planes = [one_hot(m[:, 0], 4).movedim(-1, 1) for m in (moved, fixed)]
    theirs = compute_dice(*planes, include_background=False)
    there = ~torch.isnan(ours)
    torch.testing.assert_close(ours[there], theirs[there])


def test_published_values(shared: Path) -> None:
    reference = np.load(shared / "parity" / "similarity_learning" / "metrics.npz")
    moving, fixed = (torch.from_numpy(reference[f"seg_{k}"].astype(np.int64))[None, None] for k in ("moving", "fixed"))
    score = DiceScore(reference["labels"].tolist())(moving, fixed)[0]
    torch.testing.assert_close(score[:2], torch.from_numpy(reference["dsc"][0, :2]), atol=1e-5, rtol=0)
    # The reference scores 0 where one map lacks the label; a label that is not there is not a bad match of it.
    assert torch.isnan(score[2:]).all()


@pytest.mark.parametrize("labels", [[], [1, 1]])
def test_bad_labels(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct"):
        DiceScore(labels)


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\).*\(1, 1, 4, 5\)"):
        DiceScore([1])(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match=r"moved_label must be.*\(1, 2, 4, 4\)"):
        DiceScore([1])(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
