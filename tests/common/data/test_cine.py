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

from common.data import PairDataset, check_integrity, load_cohort
from common.data.cine import LABELS, CinePair, make_cine_pair
from common.spatial import jacobian_determinant, warp, warp_labels


def dice(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    pairs = [(a == value, b == value) for value in range(1, len(LABELS))]
    return [2 * int((x & y).sum()) / int(x.sum() + y.sum()) for x, y in pairs]


def moved(pair: CinePair) -> tuple[torch.Tensor, torch.Tensor]:
    field = pair.true_ddf[None]
    return warp(pair.moving[None, None], field)[0, 0], warp_labels(pair.moving_label[None, None].int(), field)[0, 0]


@pytest.fixture(scope="module")
def pairs() -> list[CinePair]:
    return [make_cine_pair((80, 72), subject=subject) for subject in range(8)]


def test_the_true_motion_brings_systole_to_diastole(pairs: list[CinePair]) -> None:
    for pair in pairs:
        image, label = moved(pair)
        assert min(dice(label, pair.fixed_label)) > 0.93
        # What is left is the noise of both scans, 0.025 each, a little smoothed, and their bias.
        assert float((image - pair.fixed).square().mean()) < 0.5 * float((pair.moving - pair.fixed).square().mean())
        assert float(jacobian_determinant(pair.true_ddf[None]).min()) > 0


def test_the_heart_contracts_as_hearts_do(pairs: list[CinePair]) -> None:
    for pair in pairs:
        diastole, systole = (
            torch.bincount(label.flatten().long(), minlength=4) for label in (pair.fixed_label, pair.moving_label)
        )
        ejected = 1 - systole[1:] / diastole[1:]
        assert 0.3 < ejected[0] < 0.75, "the left ventricle's blood goes out"
        assert abs(ejected[1]) < 0.15, "muscle is not compressed"
        assert float(pair.true_ddf.norm(dim=0).max()) > 2.5
    before = np.mean([dice(pair.moving_label, pair.fixed_label) for pair in pairs])
    assert 0.5 < before < 0.8


def test_without_motion_both_phases_differ_by_noise_alone() -> None:
    pair = make_cine_pair((40, 48), magnitude=0.0)
    assert torch.equal(pair.fixed_label, pair.moving_label) and not pair.true_ddf.any()
    assert 0 < float((pair.fixed - pair.moving).square().mean()) < 0.004


def test_subjects_slices_and_seeds_differ_and_nothing_else_does() -> None:
    one = make_cine_pair((48, 48), seed=3, subject=5)
    assert all(torch.equal(a, b) for a, b in zip(one, make_cine_pair((48, 48), seed=3, subject=5), strict=True))
    for other in ({"seed": 4, "subject": 5}, {"seed": 3, "subject": 6}, {"seed": 3, "subject": 5, "level": -1.0}):
        assert not torch.equal(one.fixed_label, make_cine_pair((48, 48), **other).fixed_label)
    apex = make_cine_pair((48, 48), seed=3, subject=5, level=-1.0)
    assert int((apex.fixed_label == 1).sum()) < 0.6 * int((one.fixed_label == 1).sum())


def test_the_cohort_is_whole_sound_and_made_of_pairs(tmp_path: Path) -> None:
    cohort = load_cohort("cine", tmp_path, spatial_dims=2, spatial_size=32)
    assert (len(cohort.training), len(cohort.training_pairs)) == (0, 40)
    assert (len(cohort.validation), len(cohort.test)) == (8, 16)
    assert (cohort.shape, cohort.labels, cohort.stacks) == ((32, 32), LABELS, False)
    report = check_integrity(cohort)
    assert (report.images, set(report.label_voxels)) == (128, set(LABELS))
    item = PairDataset(cohort.training_pairs, strategy="listed")[3]
    assert (item["moving_id"], item["fixed_id"]) == ("cine_0003_ES", "cine_0003_ED")
    assert item["fixed_label"].shape == (1, 32, 32)
    again = load_cohort("cine", tmp_path, spatial_size=32, train_count=3, seed=1)
    assert len(again.training_pairs) == 3 and again.test == cohort.test
    assert {pair["moving_id"] for pair in again.training_pairs} < {pair["moving_id"] for pair in cohort.training_pairs}


def test_impossible_cohorts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cine' is 2-D, spatial_dims is 3"):
        load_cohort("cine", tmp_path, spatial_dims=3)
    with pytest.raises(ValueError, match="at least 32"):
        load_cohort("cine", tmp_path, spatial_size=[16, 40])
