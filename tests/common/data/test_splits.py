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
"""The lists in ``data_splits/`` are what their rules and sources say."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from common.data import load_cohort

NAMES = ["hippocampus", "oasis2d", "oasis", "lumir", "abdomen_ct", "ixi", "autopet"]
BY_FOLDER = ["acdc", "camcan", "mnms", "ukbb", "ukbb_brain"]  # see test_subject_folders.py


def read(repository: Path, name: str) -> dict[str, Any]:
    return json.loads((repository / f"data_splits/{name}.json").read_text())


@pytest.fixture(scope="module")
def generator(repository: Path) -> ModuleType:
    path = repository / "data_splits/make_splits.py"
    if not path.is_file():
        pytest.skip("a shipped bundle has the lists but not their generator")
    spec = importlib.util.spec_from_file_location("make_splits", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_is_what_the_generator_makes(generator: ModuleType) -> None:
    assert sorted(generator.SPLITS) == sorted([*NAMES, *BY_FOLDER])
    assert generator.main(["--check"]) == 0


def test_a_changed_file_is_noticed(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    (tmp_path / "facts").symlink_to(repository / "data_splits/facts")
    monkeypatch.setattr(generator, "HERE", tmp_path)
    generator.main([])
    assert generator.main(["--check"]) == 0
    (tmp_path / "oasis2d.json").write_text("{}")
    assert generator.main(["--check"]) == 1


def test_the_generator_starts_from_the_given_facts(shared: Path, repository: Path) -> None:
    given = json.loads((shared / "splits/oasis_neurite.json").read_text())
    facts = json.loads((repository / "data_splits/facts/oasis.json").read_text())
    for ours, theirs in {
        "training": "training",
        **{f"test_{n}": f"test_{n}_pairs" for n in ("020", "100", "200")},
    }.items():
        assert facts[ours] == given[theirs]
    given = json.loads((shared / "splits/abdomen_ct.json").read_text())
    facts = json.loads((repository / "data_splits/facts/abdomen_ct.json").read_text())
    assert (facts["validation"], facts["test"]) == (given["validation_pairs"], given["test_pairs"])
    given = json.loads((shared / "splits/lumir.json").read_text())
    lumir = read(repository, "lumir")
    assert lumir["evaluation_labels"] == given["segmentation_labels"]
    found = [[pair[f"{role}_id"][9:13] for role in ("fixed", "moving")] for pair in lumir["validation"]]
    assert found == given["validation_pairs"]


def sha(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


HASHES = {
    ("lumir", "training"): ("./imagesTr/{}.nii.gz", "f9915349ee23c027"),
    ("lumir", "validation"): ("./imagesVal/{}.nii.gz", "d6768dc53834c5be"),
    ("oasis", "validation"): ("./val/img{}.nii.gz", "07a0b489673cfa48"),
    ("oasis", "test_020"): ("./test/img{}.nii.gz", "aa78909dc6e2de29"),
    ("oasis", "test_100"): ("./test/img{}.nii.gz", "0ef3179bf4d21486"),
    ("oasis", "test"): ("./test/img{}.nii.gz", "da547f867fc4d6d1"),
    ("abdomen_ct", "training"): ("./train/img{}.nii.gz", "04e3e85460e1fe62"),
    ("abdomen_ct", "validation"): ("./val/img{}.nii.gz", "f592b4ae8425dbfe"),
    ("abdomen_ct", "test"): ("./test/img{}.nii.gz", "86c190d1b9b4042d"),
}


@pytest.mark.parametrize(("name", "split"), HASHES)
def test_published_hashes(repository: Path, name: str, split: str) -> None:
    """sha256 of the study's own lists, one image or 'fixed,moving' a line."""
    pattern, expected = HASHES[name, split]
    roles = ("id",) if split == "training" else ("fixed_id", "moving_id")
    lines = (",".join(pattern.format(entry[role]) for role in roles) for entry in read(repository, name)[split])
    assert sha(lines) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ixi", "autopet")])
def test_splits_are_disjoint_and_pairs_are_of_two_subjects(repository: Path, name: str) -> None:
    content = read(repository, name)
    members = [{entry["id"] for entry in content["training"]}]
    assert len(members[0]) == len(content["training"])
    for split in ("validation", "test"):
        pairs = [(pair["moving_id"], pair["fixed_id"]) for pair in content[split]]
        assert all(moving != fixed for moving, fixed in pairs)
        assert len(set(pairs)) == len(pairs)
        members.append({subject for pair in pairs for subject in pair})
    assert sum(map(len, members)) == len(set.union(*members))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("hippocampus", (160, 20, 60)), ("oasis2d", (60, 8, 24)), ("oasis", (300, 30, 200)), ("lumir", (3384, 38, 0))],
)
def test_sizes(repository: Path, name: str, sizes: tuple[int, ...]) -> None:
    content = read(repository, name)
    assert tuple(len(content[split]) for split in ("training", "validation", "test")) == sizes


@pytest.mark.parametrize(("name", "validation", "test"), [("hippocampus", 20, 40), ("oasis2d", 8, 12)])
def test_our_pairs_cover_every_subject_in_both_roles(repository: Path, name: str, validation: int, test: int) -> None:
    content = read(repository, name)
    for split, count in (("validation", validation), ("test", test)):
        for role in ("moving_id", "fixed_id"):
            assert len(Counter(pair[role] for pair in content[split])) == count


def test_lumir_training_sizes_nest_and_are_what_load_cohort_gives(repository: Path, tmp_path: Path) -> None:
    sizes = read(repository, "lumir")["training_sizes"]
    assert [int(size) for size in sizes] == [3384, 1000, 300, 100, 50, 30, 20, 10]
    for size, members in sizes.items():
        assert len(set(members)) == int(size)
        assert sizes["3384"][: int(size)] == members
    cohort = load_cohort("lumir", tmp_path, train_count=50, must_exist=False)
    assert [entry["id"] for entry in cohort.training] == sizes["50"]


@pytest.mark.parametrize("name", NAMES)
def test_every_json_says_what_a_user_needs(repository: Path, name: str) -> None:
    content = read(repository, name)
    for key in ("name", "description", "source", "reference", "licence", "tensorImageSize", "labels", "training"):
        assert key in content, key
    assert content["name"] == name
    assert not any("/work" in line or "/tmp" in line for line in json.dumps(content).splitlines())
    assert name in (repository / "data_splits/README.md").read_text()


def test_autopets_structures_are_totalsegmentators_merged(repository: Path) -> None:
    content = read(repository, "autopet")
    merged = {int(label): values for label, values in content["label_map"].items()}
    assert sorted(merged) == list(range(40)) == sorted(map(int, content["labels"]))
    assert sorted(value for values in merged.values() for value in values) == list(range(105)), "each value once"
    assert merged[0] == [0, 50, 51, 52, 53, 54, 93]
    assert merged[13] == [13, 14] and merged[15] == list(range(18, 42)) and merged[27] == list(range(58, 82))
    assert [merged[label] for label in (28, 30, 33, 39)] == [[82, 84, 86], [88, 90], [94, 96, 98], [104]]


def test_ixi_evaluates_the_published_thirty_of_forty_six_codes(repository: Path) -> None:
    content = read(repository, "ixi")
    codes = [int(code) for code in content["labels"]]
    assert len(codes) == 46 and codes == sorted(codes) and codes[0] == 0
    positions = [codes.index(code) for code in content["evaluation_labels"]]
    assert positions == [1, 2, 3, *range(5, 17), 18, *range(20, 24), *range(25, 33), 34, 36] and len(positions) == 30
