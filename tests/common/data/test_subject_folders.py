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
"""Cohorts with a folder a subject: files are found by their published names, wherever the split comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.data import load_cohort

NAMES = {
    "ukbb": ("sa_ED.nii.gz", "sa_ES.nii.gz", "label_sa_ED.nii.gz", "label_sa_ES.nii.gz"),
    "mnms": ("ED_img.nii.gz", "ES_img.nii.gz", "ED_seg.nii.gz", "ES_seg.nii.gz"),
    "camcan": ("T1_brain.nii.gz", "T1_brain_MALPEM_tissues.nii.gz"),
    "ukbb_brain": (
        "T2_FLAIR_unbiased_brain_affine_to_mni.nii.gz",
        "T1_first_all_fast_firstseg_affine_to_mni.nii.gz",
        "T1_brain_mask_affine_to_mni.nii.gz",
    ),
}


def touch(root: Path, name: str, subject: str, leave_out: str = "") -> None:
    (root / subject).mkdir(parents=True)
    for file in NAMES[name]:
        if file != leave_out:
            (root / subject / file).touch()


def touch_acdc(root: Path, number: int, diastole: int, systole: int) -> None:
    folder = root / f"patient{number:03d}"
    folder.mkdir(parents=True)
    (folder / "Info.cfg").write_text(f"ED: {diastole}\nES: {systole}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n")
    for frame in (diastole, systole):
        for kind in ("", "_gt"):
            (folder / f"{folder.name}_frame{frame:02d}{kind}.nii.gz").touch()
    (folder / f"{folder.name}_4d.nii.gz").touch()


@pytest.mark.parametrize("name", ["ukbb", "mnms"])
def test_systole_moves_to_diastole(name: str, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for subject in ("s10", "s9"):
            touch(tmp_path / split, name, f"{split}_{subject}")
    cohort = load_cohort(name, tmp_path, spatial_dims=2)
    assert cohort.stacks and not cohort.training
    assert [pair["subject"] for pair in cohort.training_pairs] == ["train_s9", "train_s10"]
    (pair,) = cohort.test[:1]
    assert (pair["moving_id"], pair["fixed_id"]) == ("test_s9_ES", "test_s9_ED")
    for key, file in zip(("fixed", "moving", "fixed_label", "moving_label"), NAMES[name], strict=True):
        assert pair[key] == str(tmp_path / "test/test_s9" / file)
    assert len(load_cohort(name, tmp_path, train_count=1).training_pairs) == 1


def test_three_dimensions_take_stacks_as_volumes(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        touch(tmp_path / split, "mnms", split)
    stacks, volumes = (load_cohort("mnms", tmp_path, spatial_dims=dims) for dims in (2, 3))
    assert (stacks.stacks, stacks.spatial_dims) == (True, 2) and load_cohort("mnms", tmp_path).stacks
    assert (volumes.stacks, volumes.spatial_dims) == (False, 3)
    assert volumes.training_pairs == stacks.training_pairs and volumes.test == stacks.test


def test_acdc_as_published_with_frames_from_its_own_file(tmp_path: Path) -> None:
    for number in range(1, 21):
        touch_acdc(tmp_path / "database/training", number, 1, 9 + number % 4)
    for number in range(101, 104):
        touch_acdc(tmp_path / "database/testing", number, 1, 12)
    for folder in (tmp_path, tmp_path / "database"):
        cohort = load_cohort("acdc", folder)
        assert [len(x) for x in (cohort.training_pairs, cohort.validation, cohort.test)] == [18, 2, 3]
    assert cohort.test[0]["moving_label"].endswith("testing/patient101/patient101_frame12_gt.nii.gz")
    members = {pair["subject"] for pair in cohort.training_pairs} | {pair["subject"] for pair in cohort.validation}
    assert len(members) == 20
    assert load_cohort("acdc", tmp_path).validation == cohort.validation


def test_a_frame_file_that_tells_no_frames_is_named(tmp_path: Path) -> None:
    for number in range(1, 5):
        touch_acdc(tmp_path / "training", number, 1, 9)
    (tmp_path / "training/patient003/Info.cfg").write_text("ED: 1\nES: unknown\n")
    with pytest.raises(ValueError, match=r"patient003/Info.cfg: expected 'ED: <number>' and 'ES: <number>'"):
        load_cohort("acdc", tmp_path)
    (tmp_path / "training/patient003/Info.cfg").unlink()
    with pytest.raises(FileNotFoundError, match=r"patient003/Info.cfg is missing"):
        load_cohort("acdc", tmp_path)


def test_subjects_without_split_folders_are_split_the_same_way_each_time(tmp_path: Path) -> None:
    for number in range(20):
        touch(tmp_path, "camcan", f"CC{number:06d}")
    cohort = load_cohort("camcan", tmp_path, spatial_dims=3)
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (14, 2, 4)
    ids = [{entry["id"] for entry in cohort.training}]
    for pairs in (cohort.validation, cohort.test):
        ring = [(pair["moving_id"], pair["fixed_id"]) for pair in pairs]
        assert {moving for moving, _ in ring} == {fixed for _, fixed in ring}
        assert all(moving != fixed for moving, fixed in ring)
        assert all("moving_label" in pair and "fixed_label" in pair for pair in pairs)
        ids.append({fixed for _, fixed in ring})
    assert sum(map(len, ids)) == len(set.union(*ids)) == 20
    assert load_cohort("camcan", tmp_path).test == cohort.test


def test_a_missing_image_is_an_error_and_a_missing_label_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(6):
        touch(tmp_path, "ukbb", f"s{number}", leave_out="label_sa_ES.nii.gz" if number == 2 else "")
    cohort = load_cohort("ukbb", tmp_path)
    every = [*cohort.training_pairs, *cohort.validation, *cohort.test]
    assert [pair["subject"] for pair in every if "moving_label" not in pair] == ["s2"]
    assert "1 of" in caplog.text and "have no label map, such as ['s2']" in caplog.text
    (tmp_path / "s4/sa_ES.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 12 images are missing.*s4/sa_ES.nii.gz.*ukbiobank"):
        load_cohort("ukbb", tmp_path)


def test_a_users_own_rule_works_as_the_shipped_ones_do(tmp_path: Path) -> None:
    rule = {"hold_out": {"validation": 0.5}, "moving": {"image": ["b.nii", "b.nii.gz"]}, "fixed": {"image": ["a.nii"]}}
    for name in ("p1", "p2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii").touch()
    (tmp_path / "p1/b.nii").touch()
    (tmp_path / "p2/b.nii.gz").touch()
    (tmp_path / "mine.json").write_text(json.dumps({"name": "mine", "stacks": True, "subject_folders": rule}))
    cohort = load_cohort(tmp_path / "mine.json")
    every = [*cohort.training_pairs, *cohort.validation]
    assert {Path(pair["moving"]).name for pair in every} == {"b.nii", "b.nii.gz"} and not cohort.test


def test_listed_training_pairs_are_set_aside_where_none_validate(tmp_path: Path) -> None:
    pairs = [{"moving": f"m{n}.nii", "fixed": f"f{n}.nii"} for n in range(10)]
    (tmp_path / "mine.json").write_text(json.dumps({"training_paired_images": pairs}))
    cohort = load_cohort(tmp_path / "mine.json", hold_out=0.2, must_exist=False)
    assert (len(cohort.training_pairs), len(cohort.validation)) == (8, 2)
    with pytest.raises(ValueError, match="too few to set 1 aside"):
        (tmp_path / "mine.json").write_text(json.dumps({"training_paired_images": pairs[:1]}))
        load_cohort(tmp_path / "mine.json", hold_out=0.2, must_exist=False)


@pytest.fixture
def brains(tmp_path: Path) -> Path:
    for number in range(20):
        touch(tmp_path / "images", "ukbb_brain", f"{1000 + number}")
    return tmp_path


def test_brains_are_registered_to_the_atlas_of_the_first_line(brains: Path) -> None:
    (brains / "train_biobank_1500.csv").write_text("".join(f"1007,{1000 + n}\n" for n in range(12)))
    (brains / "images/val_biobank_1500.csv").write_text("".join(f"1007,{1000 + n}\r\n" for n in range(12, 18)))
    for folder in (brains, brains / "images"):
        cohort = load_cohort("ukbb_brain", folder, spatial_dims=3)
        assert cohort.atlas is not None and cohort.atlas["id"] == "1007"
        assert [pair["moving_id"] for pair in cohort.test] == [str(n) for n in range(1012, 1018)]
        assert len(cohort.validation) == 1 and len(cohort.training) == 10
        ids = {entry["id"] for entry in cohort.training} | {pair["moving_id"] for pair in cohort.validation}
        assert ids == {str(n) for n in range(1000, 1012)} - {"1007"}
        for pair in (*cohort.validation, *cohort.test):
            for key, file in zip(("", "_label", "_mask"), NAMES["ukbb_brain"], strict=True):
                assert pair[f"fixed{key}"] == str(brains / "images/1007" / file)
                assert pair[f"moving{key}"] == str(brains / "images" / pair["moving_id"] / file)
    assert len(cohort.evaluation_labels) == 15 and cohort.labels[16] == "brain stem" and cohort.labels[58]
    assert "mask" in cohort.training[0] and len(load_cohort("ukbb_brain", brains, train_count=1).training) == 1


def test_brains_without_lists(brains: Path, caplog: pytest.LogCaptureFixture) -> None:
    cohort = load_cohort("ukbb_brain", brains)
    assert cohort.atlas is not None and "no list names the atlas" in caplog.text
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (13, 2, 4)
    every = [e["id"] for e in cohort.training] + [p["moving_id"] for p in (*cohort.validation, *cohort.test)]
    assert sorted([*every, cohort.atlas["id"]]) == [str(1000 + n) for n in range(20)]
    assert {pair["fixed_id"] for pair in (*cohort.validation, *cohort.test)} == {cohort.atlas["id"]}
    other = load_cohort("ukbb_brain", brains, atlas="1004")
    assert other.atlas is not None and other.atlas["id"] == "1004"
    assert {pair["fixed_id"] for pair in other.test} == {"1004"}


def test_a_list_of_test_subjects_alone_leaves_the_others_to_train(brains: Path) -> None:
    (brains / "test.csv").write_text("1003, 1001\n1003, 1002\n\n")
    cohort = load_cohort("ukbb_brain", brains)
    assert [pair["moving_id"] for pair in cohort.test] == ["1001", "1002"]
    assert (len(cohort.training), len(cohort.validation)) == (15, 2)
    assert cohort.atlas is not None and cohort.atlas["id"] == "1003"


def test_unusable_lists_are_named(brains: Path) -> None:
    path = brains / "train.csv"
    for content, reason in (
        ("1001,1002\n1003,1004\n", r"line 2: the fixed image is '1003'.*atlas '1001'"),
        ("1001\n", "line 1: expected 'fixedID,movingID', found '1001'"),
        ("1001,1002\n1001,1002\n", "line 2: '1002' is listed twice"),
        ("1001,1001\n", "lists no pair"),
        ("", "lists no pair"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            load_cohort("ukbb_brain", brains)
    path.write_text("1001,1002\n1001,4242\n")
    with pytest.raises(FileNotFoundError, match=r"1 subjects that are listed have no folder.*4242.*ukbiobank"):
        load_cohort("ukbb_brain", brains)
    path.write_text("4242,1002\n4242,1003\n4242,1004\n")
    with pytest.raises(FileNotFoundError, match="the atlas '4242' has no folder"):
        load_cohort("ukbb_brain", brains)
