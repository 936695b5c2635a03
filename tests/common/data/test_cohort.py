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

from common.data import PairDataset, load_cohort
from common.data.datalist import parse_labels
from common.io import save_image

Writer = Callable[..., Path]
Entries = list[dict[str, str]]


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_decathlon(four: Entries, write_json: Writer, tmp_path: Path) -> None:
    path = write_json(
        name="Organ", licence="CC0", labels={"0": "background", "1": "left", "2": "right"}, training=four, test=[]
    )
    cohort = load_cohort(path)
    assert (cohort.name, cohort.licence, cohort.labels) == ("Organ", "CC0", {0: "background", 1: "left", 2: "right"})
    assert cohort.foreground_labels == cohort.evaluation_labels == [1, 2]
    assert [entry["id"] for entry in cohort.training] == [f"case_{n:04d}_0000" for n in range(4)]
    assert cohort.training[2]["label"] == str(tmp_path / "labelsTr/case_0002_0000.nii.gz")
    assert cohort.validation == cohort.test == []
    assert PairDataset(cohort.training)[0]["moving_label"].shape == (1, 6, 5, 4)


def test_learn2reg_with_validation_pairs(four: Entries, write_json: Writer, tmp_path: Path) -> None:
    path = write_json(
        name="LUMIR-like",
        tensorImageShape={"0": [6, 5, 4]},
        training=[{"image": entry["image"]} for entry in four[:2]],
        registration_val=[{"fixed": "./imagesTr/case_0003_0000.nii.gz", "moving": "./imagesTr/case_0002_0000.nii.gz"}],
    )
    cohort = load_cohort(path)
    assert cohort.shape == (6, 5, 4)
    assert "label" not in cohort.training[0]
    (pair,) = cohort.validation
    assert (pair["moving_id"], pair["fixed_id"]) == ("case_0002_0000", "case_0003_0000")
    # Learn2Reg lists no labels for pairs: they lie in labelsTr under the image's name.
    assert pair["fixed_label"] == str(tmp_path / "labelsTr/case_0003_0000.nii.gz")
    item = PairDataset(cohort.validation, strategy="listed")[0]
    assert (item["moving_id"], item["fixed_label"].shape) == ("case_0002_0000", (1, 6, 5, 4))


def test_learn2reg_paired_training(four: Entries, write_json: Writer) -> None:
    images = [entry["image"] for entry in four]
    path = write_json(
        training=[{"image": image} for image in images],
        training_paired_images=[{"fixed": images[0], "moving": images[1]}],
        val=[{"fixed": images[2], "moving": images[3]}],
    )
    cohort = load_cohort(path)
    assert len(cohort.training) == 4
    assert [(p["moving_id"][5:9], p["fixed_id"][5:9]) for p in cohort.training_pairs] == [("0001", "0000")]
    assert len(cohort.validation) == 1


def test_a_monai_datalist_with_other_names(four: Entries, write_json: Writer) -> None:
    first, second = four[:2]
    pair = {"fixed_image": first["image"], "moving_image": second["image"], "fixed_seg": first["label"]}
    cohort = load_cohort(write_json(training=[{"image": first["image"], "seg": None}, *four[1:]], test=[pair]))
    assert "label" not in cohort.training[0]
    assert cohort.test[0]["fixed_label"] == cohort.test[0]["fixed"].replace("images", "labels")
    assert cohort.test[0]["moving_label"] == cohort.training[1]["label"], "known from the training entry"


def test_single_images_are_paired_with_the_one_before(four: Entries, write_json: Writer) -> None:
    cohort = load_cohort(write_json(training=four[:2], validation=four, test=[entry["image"] for entry in four[2:]]))
    assert [(p["moving_id"][5:9], p["fixed_id"][5:9]) for p in cohort.validation] == [
        ("0000", "0001"),
        ("0001", "0002"),
        ("0002", "0003"),
    ]
    assert "moving_label" in cohort.validation[0]
    assert len(cohort.test) == 1


def test_a_datalist_and_a_folder_make_a_cohort(four: Entries, write_json: Writer, tmp_path: Path) -> None:
    path = write_json(training=four)
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    path = path.rename(elsewhere / "mine.json")
    assert len(load_cohort("my own", tmp_path, datalist=path).training) == 4
    with pytest.raises(FileNotFoundError, match=r"8 of 8 files are missing under .*lists"):
        load_cohort(path)


def test_files_of_one_name_in_many_folders_get_their_folder_as_id(write_json: Writer, tmp_path: Path) -> None:
    touch(tmp_path, "anna/brain.nii.gz", "bert/brain.nii.gz")
    cohort = load_cohort(write_json(training=[{"image": f"{n}/brain.nii.gz"} for n in ("anna", "bert")]))
    assert [entry["id"] for entry in cohort.training] == ["anna/brain", "bert/brain"]


def test_other_keys_are_kept_for_pairing_visits(write_json: Writer, tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    entries = [{"image": f"{n}.nii.gz", "subject": "one", "visit": n} for n in "ab"]
    cohort = load_cohort(write_json(training=entries))
    assert len(PairDataset(cohort.training, strategy="intra")) == 2


def test_training_subsets_nest(four: Entries, write_json: Writer) -> None:
    path = write_json(training=four)
    half, most = load_cohort(path, train_fraction=0.5), load_cohort(path, train_count=3)
    assert most.training[:2] == half.training
    with pytest.raises(ValueError, match=r"train_fraction 0.25 of 4 gives 1 training subject.*at least 2"):
        load_cohort(path, train_fraction=0.25)


def test_missing_files_are_named_with_the_source(four: Entries, write_json: Writer, tmp_path: Path) -> None:
    path = write_json(name="Organ", training=four, source="https://example.org", licence="CC BY 4.0")
    (tmp_path / "labelsTr/case_0001_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 files.*labelsTr/case_0001.*example.org.*CC BY 4.0"):
        load_cohort(path)
    assert len(load_cohort(path, must_exist=False).training) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"validation": []}, "expected a 'training' list, found the keys"),
        ({"training": [{"label": "x"}]}, r"training\[0\]: expected a path under 'image'"),
        ({"training": [{"image": 3}]}, "found 3"),
        ({"training": [], "test": [{"fixed": "a"}]}, r"test\[0\]: expected a path under 'moving'"),
        ({"training": [], "labels": "three"}, "labels: expected an object or a list, found 'three'"),
    ],
)
def test_unusable_jsons_say_where(write_json: Writer, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_cohort(write_json(**content))


@pytest.mark.parametrize("stated", [{"shape": [6, 5, 4]}, {"tensorImageSize": {"0": "3D"}}, {"tensorImageSize": "3d"}])
def test_another_dimension_is_refused_before_anything_is_read(
    four: Entries, write_json: Writer, stated: dict[str, Any]
) -> None:
    path = write_json(name="organ", training=four, **stated)
    assert load_cohort(path, spatial_dims=3).spatial_dims == 3
    with pytest.raises(ValueError, match="'organ' is 3-D, spatial_dims is 2"):
        load_cohort(path, spatial_dims=2)


def test_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{'training': []}")
    with pytest.raises(ValueError, match=r"x.json is not valid JSON.*line 1"):
        load_cohort(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="found a list"):
        load_cohort(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError):
        load_cohort(tmp_path / "y.json")


def test_unknown_names_and_options(four: Entries, write_json: Writer) -> None:
    with pytest.raises(ValueError, match=r"unknown cohort 'brains'.*'hippocampus'"):
        load_cohort("brains")
    with pytest.raises(TypeError, match=r"\['spatial_size'\] are for embedded cohorts"):
        load_cohort(write_json(training=four), spatial_size=24)
    with pytest.raises(ValueError, match="has no list 'test_7'; it has \\['training'\\]"):
        load_cohort(write_json(training=four), test_list="test_7")


@pytest.mark.parametrize(
    ("labels", "parsed"),
    [
        (None, {}),
        ({"0": "background", "1": "a"}, {0: "background", 1: "a"}),
        ({"background": 0, "a": 1}, {0: "background", 1: "a"}),
        (["background", "a"], {0: "background", 1: "a"}),
        ({"0": {"1": "liver"}, "1": {"1": "liver", "4": "spleen"}}, {1: "liver", 4: "spleen"}),
    ],
)
def test_label_forms(labels: Any, parsed: dict[int, str]) -> None:
    assert parse_labels(labels) == parsed


# The data sets whose JSONs we ship.


def test_the_real_hippocampi(shared: Path) -> None:
    for folder in (shared / "data", shared / "data/Task04_Hippocampus"):
        cohort = load_cohort("hippocampus", folder, train_count=10)
        assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (10, 20, 60)
    item = PairDataset(cohort.test, strategy="listed")[0]
    assert set(item["fixed_label"].unique().tolist()) == {0, 1, 2}


def test_the_real_slices(shared: Path) -> None:
    cohort = load_cohort("oasis2d", shared / "data/OASIS2D")
    assert (len(cohort.training), len(cohort.validation), len(cohort.test), cohort.shape) == (60, 8, 24, (128, 128))


@pytest.mark.parametrize(
    ("pattern", "label", "shape"),
    [
        ("OASIS_OAS1_{id}_MR1/aligned_norm.nii.gz", "OASIS_OAS1_{id}_MR1/aligned_seg35.nii.gz", (160, 192, 224)),
        ("imagesTr/OASIS_{id}_0000.nii.gz", "labelsTr/OASIS_{id}_0000.nii.gz", None),
        ("{split}/img{id}.nii.gz", "{split}/seg{id}.nii.gz", None),
    ],
)
def test_oasis_is_found_in_each_of_its_layouts(
    tmp_path: Path, pattern: str, label: str, shape: tuple[int, ...] | None
) -> None:
    names = load_cohort("oasis", tmp_path, must_exist=False)
    splits = {"train": [entry["id"] for entry in names.training]}
    splits["val"] = [pair["fixed_id"] for pair in names.validation]
    splits["test"] = [pair[f"{r}_id"] for pair in names.test for r in ("moving", "fixed")]
    for split, members in splits.items():
        touch(tmp_path, *(p.format(id=n, split=split) for n in members for p in (pattern, label)))
    cohort = load_cohort("oasis", tmp_path, test_list="test_020")
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (300, 30, 20)
    assert cohort.test[0]["fixed"] == str(tmp_path / pattern.format(id="0037", split="test"))
    assert cohort.test[0]["fixed_label"] == str(tmp_path / label.format(id="0037", split="test"))
    assert cohort.shape == shape
    (tmp_path / label.format(id="0037", split="test")).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of \d+ files.*0037.*medical-datasets.*OASIS data use"):
        load_cohort("oasis", tmp_path, test_list="test_020")


def test_abdomen_ct_as_the_2020_release_has_it(tmp_path: Path) -> None:
    labelled = [f"{n:04d}" for n in [*range(1, 11), *range(21, 41)]]
    touch(tmp_path, *(f"Training/{k}{n}.nii.gz" for n in labelled for k in ("img/img", "label/label")))
    touch(tmp_path, *(f"Testing/img/img{n:04d}.nii.gz" for n in range(61, 81)))
    cohort = load_cohort("abdomen_ct", tmp_path)
    assert sum("label" in entry for entry in cohort.training) == 10
    assert cohort.training[-1]["image"].endswith("Testing/img/img0080.nii.gz")
    assert all("moving_label" in pair and "fixed_label" in pair for pair in cohort.test)


@pytest.mark.parametrize(
    "name",
    [
        "oasis",
        "lumir",
        "abdomen_ct",
        "ixi",
        "hippocampus",
        "oasis2d",
        "acdc",
        "camcan",
        "mnms",
        "ukbb",
        "ukbb_brain",
        "autopet",
    ],
)
def test_without_data_the_error_says_where_to_get_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"'{name}' needs dataset_dir.*Get the data: .*licence"):
        load_cohort(name)
    with pytest.raises(FileNotFoundError, match=r"Get the data: .*licence"):
        load_cohort(name, tmp_path)


def test_ixi_is_listed_from_its_folders_in_natural_order(tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        for suffix, count in (("Tr", 403), ("Val", 58), ("Ts", 115)):
            touch(tmp_path, *(f"{kind}{suffix}/subject_{n}.nii.gz" for n in range(count)))
    touch(tmp_path, "atlas.nii.gz", "atlas_label.nii.gz")
    cohort = load_cohort("ixi", tmp_path, train_fraction=0.05)
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (20, 58, 115)
    assert [pair["fixed_id"] for pair in cohort.test[9:11]] == ["subject_9", "subject_10"]
    assert all(pair["moving_id"] == "atlas" and "moving_label" in pair for pair in cohort.test)
    assert cohort.atlas is not None
    assert len(cohort.evaluation_labels) == 30
    dataset = PairDataset(cohort.training, strategy="atlas", atlas=cohort.atlas)
    assert dataset.pair_ids(0) == ("atlas", cohort.training[0]["id"])
    (tmp_path / "imagesTr/subject_7.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected 403 images in .*imagesTr, found 402"):
        load_cohort("ixi", tmp_path)


def test_an_atlas_cohort_may_train_on_one_subject(tmp_path: Path, write_json: Writer) -> None:
    for name in ("atlas", "one", "two"):
        save_image(tmp_path / f"{name}.nii.gz", np.ones((3, 3, 3)), np.eye(4))
    path = write_json(training=[{"image": "one.nii.gz"}, {"image": "two.nii.gz"}], atlas={"image": "atlas.nii.gz"})
    cohort = load_cohort(path, train_count=1)
    assert len(PairDataset(cohort.training, strategy="atlas", atlas=cohort.atlas)) == 1
