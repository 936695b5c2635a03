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

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data import PairList, read_pair_table
from common.io import ScanError, save_image


def scan(path: Path, shape: tuple[int, ...] = (4, 5, 6), values: int = 50) -> Path:
    array = np.arange(np.prod(shape)).reshape(shape) % values
    return save_image(path, array.astype(np.uint8), np.eye(4))


def table(folder: Path, text: str, name: str = "pairs.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_paths_start_from_the_table_and_names_from_files(tmp_path: Path) -> None:
    text = "\ufefffixed,moving,id\n\natlas dir/ätlas.nii.gz, a b.mha ,\n../c.nii,/d.nrrd,second\n"
    first, second = read_pair_table(table(tmp_path / "lists", text))
    assert first["fixed"] == str(tmp_path / "lists/atlas dir/ätlas.nii.gz")
    assert first["moving"] == str(tmp_path / "lists/a b.mha")
    assert (first["moving_id"], first["fixed_id"], "id" in first) == ("a b", "ätlas", False)
    assert (second["fixed"], second["moving"], second["id"]) == (str(tmp_path / "c.nii"), "/d.nrrd", "second")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_between_columns(tmp_path: Path, mark: str) -> None:
    lines = ["moving,fixed,moving_id", "a.nii,b.nii,first", "a,2.nii,b.nii,"]
    text = f"{lines[0]}\n{lines[1]}\n".replace(",", mark) + f"a,2.nii{mark}b.nii{mark}\n"
    first, second = read_pair_table(table(tmp_path, text))
    assert first["moving_id"] == "first" and second["moving_id"] == "a,2"


def test_repeated_file_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    text = "moving,fixed\ns1/t1.nii.gz,s1/t2.nii.gz\ns2/t1.nii.gz,s2/t2.nii.gz\n"
    for folder in ("s1", "s2"):
        for name in ("t1", "t2"):
            scan(tmp_path / f"{folder}/{name}.nii.gz")
    listed = PairList(table(tmp_path, text))
    assert [pair["id"] for pair in listed] == ["s1_t1_to_s1_t2", "s2_t1_to_s2_t2"]
    assert listed[0]["moving_id"] == "s1/t1" and listed.spatial_dims == 3 and listed.labels == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moving,fixed,lable\n", r"unknown columns \['lable'\].*expected some of \['moving', 'fixed', 'moving_label'"),
        ("moving,id\na,b\n", r"there is no column \['fixed'\]"),
        ("moving,fixed,fixed\na,b,c\n", "twice"),
        ("moving,fixed\na.nii,\n", r"pairs.csv, line 2: the column 'fixed' is empty"),
        ("moving,fixed\na.nii,b.nii\nx,y.nii,b.nii\n", r"line 3: found 3 cells for the 2 columns"),
        ("moving,fixed\n", "lists no pair"),
        ("", "lists no pair"),
    ],
)
def test_a_table_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pair_table(table(tmp_path, text))


def test_a_table_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no table of pairs at .*none.csv"):
        read_pair_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("moving,fixed\nä,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.csv is not UTF-8"):
        read_pair_table(tmp_path / "latin.csv")


@pytest.mark.parametrize("names", [("x", "X"), ("x", "x"), ("a/b", "a_b"), ("é", "e\u0301")])
def test_pairs_of_one_name_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in ("a", "b", "c"):
        scan(tmp_path / f"{name}.nii")
    text = f"moving,fixed,id\na.nii,b.nii,{names[0]}\nb.nii,c.nii,{names[1]}\n"
    with pytest.raises(ValueError, match=r"pairs.csv: the pairs \(.*a.nii.*\) and \(.*c.nii'\) are both called"):
        PairList(table(tmp_path, text))


@pytest.mark.parametrize("name", ["..", "x" * 300, "metrics.csv"])
def test_a_name_that_can_be_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the folder of a pair"):
        PairList(table(tmp_path, f"moving,fixed,id\na,b,{name}\n"))


def test_a_name_stays_below_the_output_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii")
    assert PairList(table(tmp_path, "moving,fixed,id\na.nii,b.nii,../../up\n"))[0]["id"] == ".._.._up"


def test_some_files_may_be_missing_or_broken_but_not_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii", (4, 5, 1))
    scan(tmp_path / "volume.nii")
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    bad = "gone.nii,b.nii\nbroken.nii.gz,b.nii\nvolume.nii,a.nii\n"
    assert PairList(table(tmp_path, f"moving,fixed\n{bad}a.nii,b.nii\n")).spatial_dims == 2
    with pytest.raises(FileNotFoundError, match=r"no image at .*gone.nii"):
        PairList(table(tmp_path, f"moving,fixed\n{bad}"))
    with pytest.raises(ScanError, match=r"broken.nii.gz"):
        PairList(table(tmp_path, "moving,fixed\nbroken.nii.gz,b.nii\n"))
    with pytest.raises(ValueError, match=r"volume.nii is 3-D and .*a.nii is 2-D"):
        PairList(moving=tmp_path / "volume.nii", fixed=tmp_path / "a.nii")


def test_pairs_of_different_dimension_are_named(tmp_path: Path) -> None:
    for name, shape in (("a", (4, 5)), ("b", (6, 5)), ("c", (4, 5, 6)), ("d", (4, 5, 7))):
        scan(tmp_path / f"{name}.nii", shape)
    path = table(tmp_path, "moving,fixed\na.nii,b.nii\nc.nii,d.nii\n")
    with pytest.raises(ValueError, match=r"a.nii is 2-D and .*c.nii is 3-D: one network cannot"):
        PairList(path)
    # Of stacks the network sees slices, whatever the files have.
    assert PairList(path, stacks=True).spatial_dims == 2


def test_labels_are_those_of_pairs_with_both_maps(tmp_path: Path) -> None:
    for name, values in (("a", 50), ("b", 3), ("c", 5), ("d", 7)):
        scan(tmp_path / f"{name}.nii", values=values)
    text = "moving,fixed,moving_label,fixed_label\na.nii,a.nii,b.nii,c.nii\na.nii,b.nii,d.nii,\n"
    listed = PairList(table(tmp_path, text))
    assert listed.labels == [1, 2, 3, 4]
    assert "fixed_label" not in listed[1] and listed[1]["moving_label"] == str(tmp_path / "d.nii")


def write_json(folder: Path, **more: object) -> Path:
    for name in ("a", "b", "c"):
        scan(folder / f"imagesTr/{name}.nii.gz", (5, 6))
        scan(folder / f"labelsTr/{name}.nii.gz", (5, 6), 9)
    content = {
        "training": [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "abc"],
        "labels": {"0": "background", "1": "one", "2": "two"},
        "validation": [{"moving": "imagesTr/a.nii.gz", "fixed": "imagesTr/b.nii.gz"}],
        **more,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder / "dataset.json"


def test_a_dataset_json_has_splits_labels_and_perhaps_missing_files(tmp_path: Path) -> None:
    path = write_json(tmp_path, label_map={"1": [1, 2]})
    listed = PairList(path, split="validation")
    assert listed[0]["id"] == "a_to_b" and listed[0]["moving_label"] == str(tmp_path / "labelsTr/a.nii.gz")
    assert listed.labels == [1, 2] and listed.label_map == {1: 1, 2: 1} and listed.spatial_dims == 2
    with pytest.raises(ValueError, match=r"no pairs under --split test; it has .*'validation': 1"):
        PairList(path)
    with pytest.raises(ValueError, match="--split must be one of"):
        PairList(path, split="valid")
    pairs = [{"moving": f"imagesTr/{n}.nii.gz", "fixed": "imagesTr/b.nii.gz"} for n in ("a", "gone")]
    assert len(PairList(write_json(tmp_path, test=pairs))) == 2
    with pytest.raises(FileNotFoundError, match="3 of 3 files are missing"):
        PairList(path, dataset_dir=tmp_path / "elsewhere")


def test_a_named_cohort_and_the_example(tmp_path: Path) -> None:
    listed = PairList("contrast", dataset_dir=tmp_path)
    assert len(listed) > 1 and listed.labels and listed.spatial_dims == 2 and all("id" in pair for pair in listed)
    example = PairList(example="contrast", dataset_dir=tmp_path)
    assert len(example) == 1 and example[0]["moving"] == listed[0]["moving"] and "id" not in example[0]
    assert "moving_label" not in example[0] and example.labels == []


def test_half_a_pair_or_a_pair_too_many_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--moving a.nii has no partner: give --fixed too"):
        PairList(moving="a.nii")
    with pytest.raises(ValueError, match=r"--pairs pairs.csv lists what to register: leave out --fixed"):
        PairList("pairs.csv", fixed="b.nii")


def test_frames_of_series_belong_to_every_pair(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nib.save(
            nib.Nifti1Image(np.arange(120, dtype=np.uint8).reshape(3, 4, 5, 2), np.eye(4)), tmp_path / f"{name}.nii"
        )
    scan(tmp_path / "c.nii")
    text = "moving,fixed,moving_label,fixed_label\na.nii,b.nii,a.nii,b.nii\nb.nii,a.nii,,\n"
    listed = PairList(table(tmp_path, text), frame=1)
    assert listed.spatial_dims == 3 and all(pair["moving_frame"] == pair["fixed_frame"] == 1 for pair in listed)
    assert listed.labels == list(range(1, 120, 2))
    one = PairList(moving=tmp_path / "a.nii", fixed=tmp_path / "c.nii", moving_frame=0)
    assert one[0]["moving_frame"] == 0 and "fixed_frame" not in one[0] and one.spatial_dims == 3
    assert "moving_frame" not in PairList(moving=tmp_path / "c.nii", fixed=tmp_path / "c.nii")[0]
    with pytest.raises(ValueError, match=r"a.nii has shape .* choose a frame from 0 to 1 \(--frame\)"):
        PairList(moving=tmp_path / "a.nii", fixed=tmp_path / "b.nii", fixed_frame=1)
    with pytest.raises(ValueError, match=r"a.nii has shape .* it looks like a series"):
        PairList(moving=tmp_path / "a.nii", fixed=tmp_path / "b.nii")


def test_a_pair_and_a_list_may_have_landmarks(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii")
    header = "moving,fixed,moving_points,fixed_points,affine,id"
    rows = "a.nii,b.nii,p/m.csv,f.csv,a.mat:inverse,x\nb.nii,a.nii,,,,y"
    listed = PairList(table(tmp_path, f"{header}\n{rows}\n"), points_space="lps")
    assert listed.landmarks and listed[0]["points_space"] == "lps"
    assert listed[0]["moving_points"] == str(tmp_path / "p/m.csv")
    assert listed[0]["fixed_points"] == str(tmp_path / "f.csv")
    assert listed[0]["affine"] == str(tmp_path / "a.mat:inverse")
    assert not {"moving_points", "fixed_points", "points_space", "affine"} & set(listed[1])
    assert listed.labels == []
    scans = {"moving": tmp_path / "a.nii", "fixed": tmp_path / "b.nii"}
    one = PairList(**scans, moving_points=tmp_path / "m.csv", fixed_points="f.csv")
    assert one.landmarks and one[0]["points_space"] == "ras" and one[0]["fixed_points"] == "f.csv"
    none = PairList(**scans)
    assert not none.landmarks and "points_space" not in none[0]


def test_landmarks_of_one_scan_only_or_of_no_known_space_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii")
    with pytest.raises(
        ValueError, match=r"pairs.csv, line 3: fixed_points f.csv has no partner: give moving_points too"
    ):
        text = "moving,fixed,moving_points,fixed_points\na.nii,b.nii,,\na.nii,b.nii,,f.csv\n"
        PairList(table(tmp_path, text))
    scans = {"moving": tmp_path / "a.nii", "fixed": tmp_path / "b.nii"}
    with pytest.raises(ValueError, match=r"--moving_points m.csv has no partner: give --fixed_points too"):
        PairList(**scans, moving_points="m.csv")
    with pytest.raises(ValueError, match=r"--points_space must be one of \['voxel', 'ras', 'lps'\], got 'RAS'"):
        PairList(**scans, points_space="RAS")
    with pytest.raises(ValueError, match="leave out --fixed_points"):
        PairList("pairs.csv", fixed_points="f.csv")


def test_landmarks_of_a_cohort_are_in_voxels(tmp_path: Path) -> None:
    listed = PairList("sliding", dataset_dir=tmp_path)
    assert listed.landmarks and {pair["points_space"] for pair in listed} == {"voxel"}
    assert all(Path(pair[f"{role}_points"]).is_file() for pair in listed for role in ("moving", "fixed"))
    path = write_json(tmp_path / "own")
    points = {f"{role}_landmarks": f"points/{role}.csv" for role in ("moving", "fixed")}
    content = {**json.loads(path.read_text()), "test": [{"moving": "imagesTr/a.nii.gz", "fixed": "imagesTr/b.nii.gz"}]}
    path.write_text(json.dumps({**content, "test": [{**content["test"][0], **points}]}))
    (pair,) = PairList(path, points_space="lps")
    assert pair["moving_points"] == str(tmp_path / "own/points/moving.csv") and pair["points_space"] == "voxel"
    assert not PairList(path, split="validation").landmarks
