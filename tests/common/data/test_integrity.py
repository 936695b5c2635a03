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

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data import Cohort, IntegrityError, check_integrity, load_cohort
from common.io import load_image, save_image

Entries = list[dict[str, str]]
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
Spoil = Callable[[Path, Cohort], Any]


@pytest.fixture
def cohort(four: Entries, write_json: Callable[..., Path]) -> Cohort:
    """Two subjects for training, two for validation and test."""
    pairs = [{"fixed": four[2]["image"], "moving": four[3]["image"]}]
    path = write_json(
        name="organ", labels={"0": "b", "1": "x", "2": "y"}, shape=[6, 5, 4], spacing=[1, 1, 2], orientation="RAS",
        training=four[:2], test=pairs,
    )  # fmt: skip
    return load_cohort(path)


def test_a_good_cohort_is_summarised(cohort: Cohort) -> None:
    report = check_integrity(cohort)
    assert (report.images, report.labels, report.problems) == (4, 4, [])
    assert report.splits == {"training": 2, "validation": 0, "test": 2}
    assert report.shapes == {(6, 5, 4): 4}
    assert report.spacings == {(1.0, 1.0, 2.0): 4}
    assert report.orientations == {"RAS": 4}
    assert set(report.label_voxels) == {0, 1, 2}
    assert sum(report.label_voxels.values()) == 4 * 6 * 5 * 4
    assert 0 <= report.intensity[0] < report.intensity[1] <= 1
    assert "4 images, 4 label maps" in str(report)


def image(root: Path, n: int) -> Path:
    return root / f"imagesTr/case_{n:04d}_0000.nii.gz"


def label(root: Path, n: int) -> Path:
    return root / f"labelsTr/case_{n:04d}_0000.nii.gz"


def voxels(fill: float | None = None) -> np.ndarray:
    array = np.random.default_rng(9).random((6, 5, 4)).astype(np.float32)
    if fill is not None:
        array[0, :2, 0] = fill
    return array


SPOILT: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda r, c: image(r, 0).unlink(), r"case_0000.*the file is missing"),
    "missing label": (lambda r, c: label(r, 3).unlink(), r"labelsTr/case_0003.*the file is missing"),
    "damaged": (lambda r, c: image(r, 1).write_bytes(image(r, 1).read_bytes()[:200]), r"case_0001.*unreadable"),
    "shape": (
        lambda r, c: [save_image(f(r, 0), np.ones((6, 5, 3)) * [0, 1, 2], AFFINE) for f in (image, label)],
        r"imagesTr/case_0000.*shape \(6, 5, 3\), expected \(6, 5, 4\)",
    ),
    "spacing": (
        lambda r, c: [save_image(f(r, 0), load_image(f(r, 0)).array, np.eye(4)) for f in (image, label)],
        r"spacing \(1.0, 1.0, 1.0\) mm, expected \(1.0, 1.0, 2.0\)",
    ),
    "orientation": (
        lambda r, c: [save_image(f(r, 0), load_image(f(r, 0)).array, np.diag([-1, 1, 2, 1])) for f in (image, label)],
        r"orientation LAS, expected RAS",
    ),
    "nan": (lambda r, c: save_image(image(r, 0), voxels(np.nan), AFFINE), "2 NaN and 0 infinite of 120 voxels"),
    "inf": (lambda r, c: save_image(image(r, 0), voxels(np.inf), AFFINE), "0 NaN and 2 infinite of 120 voxels"),
    "constant": (lambda r, c: save_image(image(r, 2), voxels() * 0 + 7, AFFINE), "constant image, every voxel is 7"),
    "unknown label": (
        lambda r, c: save_image(label(r, 0), np.full((6, 5, 4), 9, np.uint8), AFFINE),
        r"labelsTr/case_0000.*unknown label\(s\) \[9\], expected some of \[0, 1, 2\]",
    ),
    "label between integers": (
        lambda r, c: save_image(label(r, 0), voxels(0.5), AFFINE),
        r"no integers such as .*, expected integers",
    ),
    "label grid": (
        lambda r, c: save_image(label(r, 1), np.ones((6, 5, 4), np.uint8), np.diag([1, 1, 3, 1])),
        r"labelsTr/case_0001.*not on the grid of its image .*imagesTr/case_0001.*spacing \(1.0, 1.0, 2.0\) != ",
    ),
    "same voxels in training": (
        lambda r, c: save_image(image(r, 1), load_image(image(r, 0)).array.astype(np.float64), AFFINE),
        r"case_0001.*has the same voxels as .*case_0000",
    ),
    "same voxels in test": (
        lambda r, c: image(r, 3).write_bytes(image(r, 0).read_bytes()),
        r"case_0003.*of test has the same voxels as .*case_0000.* of training",
    ),
    "same subject in test": (
        lambda r, c: c.test[0].update(moving=c.training[1]["image"], moving_id=c.training[1]["id"]),
        r"subject 'case_0001_0000' of test is also in training",
    ),
    "same id": (lambda r, c: c.training[1].update(id="case_0000_0000"), "its id 'case_0000_0000' is also that of"),
    "listed twice": (lambda r, c: c.training.append(dict(c.training[0])), "case_0000.*listed 2 times in training"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_each_problem_is_found_alone_and_named(cohort: Cohort, tmp_path: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    spoil(tmp_path, cohort)
    with pytest.raises(IntegrityError, match=message) as caught:
        check_integrity(cohort)
    expected = {"shape": 2, "spacing": 1, "listed twice": 1}.get(name, 1)
    assert len(caught.value.problems) == (1 if name != "shape" else expected - 1)


def test_all_problems_are_told_at_once(cohort: Cohort, tmp_path: Path) -> None:
    image(tmp_path, 0).unlink()
    save_image(image(tmp_path, 2), voxels(np.nan), AFFINE)
    report = check_integrity(cohort, raise_errors=False)
    assert len(report.problems) == 2
    with pytest.raises(IntegrityError, match=r"has 2 problem\(s\)"):
        check_integrity(cohort)


def test_a_long_list_is_cut_and_counted() -> None:
    error = IntegrityError("organ", [f"problem {n}" for n in range(50)])
    assert len(error.problems) == 50
    assert "problem 19" in str(error)
    assert "problem 20" not in str(error)
    assert "and 30 more" in str(error)


def test_shapes_may_differ_where_none_is_stated(cohort: Cohort, tmp_path: Path) -> None:
    SPOILT["shape"][0](tmp_path, cohort)
    cohort.shape = None
    assert len(check_integrity(cohort).shapes) == 2


def test_labels_may_be_given_and_splits_chosen(cohort: Cohort) -> None:
    with pytest.raises(IntegrityError, match=r"unknown label\(s\) \[2\], expected some of \[1\]"):
        check_integrity(cohort, labels=[1])
    assert check_integrity(cohort, ["training"]).images == 2
    with pytest.raises(ValueError, match=r"unknown split\(s\) \['train'\]"):
        check_integrity(cohort, ["train"])


def test_an_atlas_in_every_pair_is_no_leak(cohort: Cohort) -> None:
    atlas = cohort.training.pop()
    cohort.atlas = atlas
    for split, fixed in (("validation", 2), ("test", 3)):
        name = f"case_{fixed:04d}_0000"
        pair = {"moving": atlas["image"], "moving_id": atlas["id"], "fixed_id": name}
        setattr(cohort, split, [{**pair, "fixed": str(image(Path(cohort.dataset_dir), fixed))}])
    assert check_integrity(cohort).problems == []
    cohort.atlas = None
    with pytest.raises(IntegrityError, match="of test is also in validation"):
        check_integrity(cohort)


def test_real_data_are_sound(shared: Path) -> None:
    cohort = load_cohort("hippocampus", shared / "data", train_count=12)
    report = check_integrity(cohort, ["training"], progress=False)
    assert (report.images, report.spacings, set(report.label_voxels)) == (12, {(1.0, 1.0, 1.0): 12}, {0, 1, 2})
