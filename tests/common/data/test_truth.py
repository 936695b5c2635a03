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
"""Fields and landmarks of listed pairs reach the network's grid and the measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from common.data import Cohort, PairDataset, cohort_from_json, load_cohort
from common.data.truth import known_truths, load_landmarks, load_truth
from common.engines import PairValues, standard_measures
from common.io import save_field, save_image
from common.spatial import warp, warp_points
from common.transforms import scan_transforms

SHAPE = (10, 9, 8)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return load_cohort("sliding", tmp_path_factory.mktemp("sliding"), spatial_size=[40, 36])


def test_measures_of_the_true_field_are_perfect(sliding: Cohort) -> None:
    transform = scan_transforms(spatial_size=(40, 36), intensity="none", allow_missing_keys=True)
    pairs = PairDataset(sliding.test, strategy="listed", transform=transform)
    assert pairs.truths == ["true_ddf", "landmarks"]
    batch = default_collate([pairs[0], pairs[1]])
    assert batch["true_ddf"].shape == (2, 2, 40, 36) and batch["fixed_points"].shape == (2, 24, 2)
    measures = standard_measures([1, 2, 3, 4], true_field=True, landmarks=True)
    measured = measures(PairValues(batch, {"ddf": batch["true_ddf"]}))
    assert measured["epe"].tolist() == [[0.0], [0.0]]
    assert float(measured["tre"].max()) < 0.1 and float(measured["tre_before"].min()) > 1.5
    assert float(measured["dice"].mean()) > float(measured["dice_before"].mean()) + 0.2
    still = measures(PairValues(batch, {"ddf": torch.zeros(2, 2, 40, 36)}))
    torch.testing.assert_close(still["tre"], still["tre_before"])
    torch.testing.assert_close(still["epe"][:, 0], batch["true_ddf"].norm(dim=1).flatten(1).mean(1))


def test_a_truth_leads_one_way_only(sliding: Cohort) -> None:
    pairs = PairDataset(sliding.test, strategy="listed", both_directions=True)
    assert pairs.truths == [] and "true_ddf" not in pairs[0] and len(pairs) == 32


def test_training_pairs_know_no_truth(sliding: Cohort) -> None:
    pairs = PairDataset(sliding.training_pairs, strategy="listed")
    assert pairs.truths == [] and "true_ddf" not in pairs[0]


def test_truths_move_with_padding(sliding: Cohort) -> None:
    plain = PairDataset(sliding.test, strategy="listed", transform=scan_transforms(intensity="none"))[2]
    padded = PairDataset(
        sliding.test, strategy="listed", transform=scan_transforms(spatial_size=(48, 40), intensity="none")
    )[2]
    torch.testing.assert_close(padded["true_ddf"][:, 4:-4, 2:-2], plain["true_ddf"], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded["fixed_points"], plain["fixed_points"] + torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize(("cache", "times"), [(True, 1), (False, 2)])
def test_truths_of_cached_pairs_are_read_once(
    sliding: Cohort, monkeypatch: pytest.MonkeyPatch, cache: bool, times: int
) -> None:
    reads = []

    def counted(*args: Any) -> dict[str, torch.Tensor]:
        reads.append(args)
        return load_truth(*args)

    monkeypatch.setattr("common.data.pairs.load_truth", counted)
    transform = scan_transforms(["image", "label"], allow_missing_keys=True)
    pairs = PairDataset(sliding.validation[:1], strategy="listed", transform=transform, cache=cache)
    pairs[0]["true_ddf"].zero_()  # what a caller does to an item reaches no later one
    assert pairs[0]["true_ddf"].abs().max() > 1 and len(reads) == times


@pytest.fixture
def oblique(tmp_path: Path, write_json: Callable[..., Path]) -> Cohort:
    """One pair on two different grids that are flipped and permuted, with a field of whole voxels between them."""
    draw = np.random.default_rng(0)
    affine = np.zeros((4, 4))
    affine[[0, 1, 2, 3], [2, 0, 1, 3]] = [-2.0, 1.5, -1.0, 1.0]
    other = affine.copy()
    other[:3, 3] = (6.0, -3.0, 2.0)
    moving = draw.random(SHAPE).astype(np.float32)
    ddf = np.zeros((3, *SHAPE), dtype=np.float32)
    ddf[0], ddf[2] = 2.0, -1.0
    fixed = warp(torch.from_numpy(moving)[None, None], torch.from_numpy(ddf)[None], mode="nearest")[0, 0].numpy()
    save_image(tmp_path / "imagesTr/m.nii.gz", moving, other)
    save_image(tmp_path / "imagesTr/f.nii.gz", fixed, affine)
    save_field(tmp_path / "true.nii.gz", ddf, affine, fmt="l2r")
    points = np.array([[3.0, 4.0, 5.0], [5.5, 2.25, 3.0]])
    np.savetxt(tmp_path / "f.csv", points, delimiter=",")
    np.savetxt(tmp_path / "m.csv", points + (2, 0, -1), delimiter=",")
    pair = {"moving": "imagesTr/m.nii.gz", "fixed": "imagesTr/f.nii.gz", "true_ddf": "true.nii.gz"}
    pair |= {"moving_landmarks": "m.csv", "fixed_landmarks": "f.csv"}
    path = write_json(name="oblique", training=[{"image": "imagesTr/m.nii.gz"}], test=[pair])
    return cohort_from_json(path, tmp_path)


def one_item(cohort: Cohort, orientation: str | None) -> dict[str, Any]:
    transform = scan_transforms(orientation=orientation, intensity="none", allow_missing_keys=True)
    return PairDataset(cohort.test, strategy="listed", transform=transform)[0]


def test_flips_permutations_and_other_origins_change_no_correspondence(oblique: Cohort) -> None:
    items = [one_item(oblique, codes) for codes in (None, "RAS")]
    assert items[0]["fixed"].shape[1:] == SHAPE and items[1]["fixed"].shape[1:] != SHAPE
    for item in items:
        moved = warp(item["moving"][None], item["true_ddf"][None])
        inner = (..., *[slice(2, -2)] * 3)
        torch.testing.assert_close(moved[0][inner], item["fixed"][inner], atol=1e-4, rtol=0)
        points = warp_points(item["fixed_points"][None], item["true_ddf"][None])[0]
        torch.testing.assert_close(points, item["moving_points"], atol=1e-4, rtol=0)
        batch: dict[str, Any] = default_collate([item])
        measured = standard_measures(landmarks=True)(PairValues(batch, {"ddf": batch["true_ddf"]}))
        assert float(measured["tre"]) < 1e-3


def test_landmark_errors_are_in_millimetres_of_the_moving_scan(oblique: Cohort) -> None:
    item = one_item(oblique, None)
    batch = default_collate([item])
    measured = standard_measures(landmarks=True)(PairValues(batch, {"ddf": torch.zeros(1, 3, *SHAPE)}))
    # Two voxels of 1.5 mm along the first axis, one of 2 mm along the third.
    assert float(measured["tre"]) == pytest.approx((3.0**2 + 2.0**2) ** 0.5, rel=1e-5)


def test_missing_and_unfit_truths_are_named(oblique: Cohort, tmp_path: Path) -> None:
    assert known_truths([]) == [] and known_truths([{**oblique.test[0], "true_ddf": None}]) == ["landmarks"]
    assert str(tmp_path / "true.nii.gz") in oblique.files() and str(tmp_path / "f.csv") in oblique.files()
    pairs = PairDataset(oblique.test, strategy="listed")
    (tmp_path / "f.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"m\.csv has 2 points but .*f\.csv has 1"):
        pairs[0]
    for text in ("1,2\n", "a,b,c\n", "1,2,nan\n"):
        (tmp_path / "f.csv").write_text(text)
        with pytest.raises(ValueError, match=r"f\.csv: expected 3"):
            load_landmarks(tmp_path / "f.csv", 3)
    with pytest.raises(FileNotFoundError, match="no landmarks at"):
        load_landmarks(tmp_path / "none.csv", 3)
    save_field(tmp_path / "true.nii.gz", np.zeros((3, 4, 4, 4)), np.eye(4), fmt="l2r")
    with pytest.raises(ValueError, match=r"3 components on a grid \(4, 4, 4\), expected 3 on that of"):
        pairs[0]
