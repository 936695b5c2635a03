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
"""One subject becomes the atlas that everyone is registered to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.data import PairDataset, load_cohort
from common.data.atlas import pairs_to_atlas
from tests.common.data.conftest import write_subject

Writer = Callable[..., Path]


@pytest.fixture
def dataset(tmp_path: Path, write_json: Writer) -> Path:
    """Four training subjects, a ring of two to validate, three pairs of three to test."""
    entries = [write_subject(tmp_path, f"case_{number:04d}", number) for number in range(9)]

    def pair(moving: int, fixed: int) -> dict[str, str]:
        return {"moving": entries[moving]["image"], "fixed": entries[fixed]["image"]}

    return write_json(
        labels={"1": "left", "2": "right"},
        training=entries[:4],
        validation=[pair(4, 5), pair(5, 4)],
        test=[pair(7, 6), pair(8, 7), pair(6, 8)],
        suggested_atlas="case_0002",
    )


def test_splits_become_pairs_with_the_atlas(dataset: Path) -> None:
    cohort = load_cohort(dataset, atlas="case_0001")
    assert cohort.atlas is not None and cohort.atlas["id"] == "case_0001"
    assert [entry["id"] for entry in cohort.training] == ["case_0000", "case_0002", "case_0003"]
    assert [pair["moving_id"] for pair in cohort.validation] == ["case_0004", "case_0005"]
    assert [pair["moving_id"] for pair in cohort.test] == ["case_0007", "case_0006", "case_0008"]
    for pair in (*cohort.validation, *cohort.test):
        assert pair["fixed_id"] == "case_0001" and pair["fixed"] == cohort.atlas["image"]
        assert Path(pair["moving_label"]).name == f"{pair['moving_id']}.nii.gz"
        assert pair["fixed_label"] == cohort.atlas["label"]
    training = PairDataset(cohort.training, strategy="atlas", atlas=cohort.atlas, atlas_is="fixed")
    assert [training.pair_ids(k) for k in range(3)] == [(e["id"], "case_0001") for e in cohort.training]
    item = PairDataset(cohort.test, strategy="listed")[1]
    assert (item["moving_id"], item["fixed_id"], item["fixed_label"].shape) == ("case_0006", "case_0001", (1, 6, 5, 4))


def test_the_suggested_atlas(dataset: Path) -> None:
    cohort = load_cohort(dataset, atlas=True, train_count=2)
    assert cohort.atlas is not None and cohort.atlas["id"] == "case_0002"
    assert len(cohort.training) == 2 and "case_0002" not in [entry["id"] for entry in cohort.training]
    for none in (None, False):
        plain = load_cohort(dataset, atlas=none)
        assert plain.atlas is None and len(plain.training) == 4 and plain.validation[0]["fixed_id"] == "case_0005"


def test_an_atlas_of_the_test_subjects_is_not_registered_to_itself(dataset: Path) -> None:
    cohort = load_cohort(dataset, atlas="case_0006")
    assert len(cohort.training) == 4
    assert [pair["moving_id"] for pair in cohort.test] == ["case_0007", "case_0008"]
    assert [pair["moving_id"] for pair in cohort.validation] == ["case_0004", "case_0005"]


def test_pairs_with_the_atlas_keep_what_is_known_of_them(tmp_path: Path) -> None:
    made = load_cohort("contrast", tmp_path, spatial_size=[32, 32])
    again = load_cohort("contrast", tmp_path, spatial_size=[32, 32], atlas=True)
    assert again.test == made.test and "true_ddf" in again.test[0] and again.training == made.training


def test_unknown_atlases_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no subject 'case_0042'.*case_0000"):
        load_cohort(dataset, atlas="case_0042")
    with pytest.raises(ValueError, match="suggests no atlas"):
        load_cohort("synthetic", tmp_path, spatial_size=[16, 16], spatial_dims=2, atlas=True)
    with pytest.raises(ValueError, match="pairs of one subject's scans"):
        load_cohort("cine", tmp_path, spatial_size=32, atlas="cine_0000_ED")


def test_the_hippocampus_atlas_trains(shared: Path) -> None:
    cohort = load_cohort("hippocampus", shared / "data" / "Task04_Hippocampus", atlas=True)
    assert cohort.atlas is not None and cohort.atlas["id"] == "hippocampus_303"
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (159, 20, 40)
    assert {pair["fixed_id"] for pair in (*cohort.validation, *cohort.test)} == {"hippocampus_303"}
    moving = [pair["moving_id"] for pair in (*cohort.training_pairs, *cohort.validation, *cohort.test)]
    assert len(set(moving)) == 60 and not set(moving) & {entry["id"] for entry in cohort.training}


def test_an_atlas_that_moved_becomes_the_fixed_side() -> None:
    atlas = {"id": "atlas", "image": "atlas.nii", "label": "atlas_label.nii"}
    pairs = [
        {"moving_id": "atlas", "moving": "atlas.nii", "fixed_id": name, "fixed": f"{name}.nii", "fixed_mask": "m.nii"}
        for name in ("b", "a")
    ]
    (first, second) = pairs_to_atlas(pairs, atlas)
    assert (first["moving_id"], second["moving_id"]) == ("b", "a")
    assert first == {
        **{"moving_id": "b", "moving": "b.nii", "moving_mask": "m.nii"},
        **{"fixed_id": "atlas", "fixed": "atlas.nii", "fixed_label": "atlas_label.nii"},
    }
