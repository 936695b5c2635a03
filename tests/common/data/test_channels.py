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
"""Images of two channels, merged labels and an atlas: whole-body PET/CT from its folders to a batch."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from common.data import Cohort, IntegrityError, PairDataset, check_integrity, load_cohort
from common.engines import PairValues, stack_pair, standard_measures
from common.losses import LNCC
from common.transforms import scan_transforms

SHAPE = (12, 10, 14)
AFFINE = np.diag([2.8, 2.8, 3.8, 1.0])
WINDOWS = [[-300.0, 300.0], [0.0, 15.0]]


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_case(folder: Path, split: str, name: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    images, labels = (f"images{split}/", f"labels{split}/") if split else ("", "")
    write(folder / f"{images}{name}_0000.nii.gz", draw.uniform(-1000, 1000, SHAPE).astype(np.float32))
    write(folder / f"{images}{name}_0001.nii.gz", draw.uniform(0, 25, SHAPE).astype(np.float32))
    label = draw.integers(0, 105, SHAPE).astype(np.uint8)
    write(folder / (f"{labels}{name}.nii.gz" if split else f"{name}_label.nii.gz"), label)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("autopet")
    write_case(root, "", "atlas", 0)
    for number, (split, name) in enumerate(
        [("Tr", "fdg_a_10"), ("Tr", "fdg_a_9"), ("Tr", "fdg_b_1"), ("Val", "fdg_c_1"), ("Ts", "fdg_d_1")], start=1
    ):
        write_case(root, split, name, number)
    return root


@pytest.fixture
def cohort(folder: Path) -> Cohort:
    return load_cohort("autopet", folder, spatial_dims=3)


def test_both_channels_are_listed_as_one_image(cohort: Cohort, folder: Path) -> None:
    assert [entry["id"] for entry in cohort.training] == ["fdg_a_9", "fdg_a_10", "fdg_b_1"]
    first = cohort.training[0]
    assert first["image"] == str(folder / "imagesTr/fdg_a_9_0000.nii.gz")
    assert first["channels"] == [str(folder / "imagesTr/fdg_a_9_0001.nii.gz")]
    assert first["label"] == str(folder / "labelsTr/fdg_a_9.nii.gz")
    (pair,) = cohort.validation
    assert (pair["moving_id"], pair["fixed_id"]) == ("atlas", "fdg_c_1")
    assert pair["moving_channels"] == [str(folder / "atlas_0001.nii.gz")]
    assert pair["fixed_channels"] == [str(folder / "imagesVal/fdg_c_1_0001.nii.gz")]
    assert len(cohort.files()) == 18 and len(cohort.foreground_labels) == 39


def test_the_atlas_moves_to_every_subject_in_two_channels_and_thirty_nine_labels(cohort: Cohort, folder: Path) -> None:
    transform = scan_transforms(
        spatial_size=(16, 12, 14), orientation=None, intensity=WINDOWS, channels=2, label_map=cohort.label_map
    )
    dataset = PairDataset(cohort.training, strategy="atlas", atlas=cohort.atlas, transform=transform, cache=True)
    assert [dataset.pair_ids(k) for k in range(len(dataset))] == [
        ("atlas", name) for name in ("fdg_a_9", "fdg_a_10", "fdg_b_1")
    ]
    item = dataset[0]
    assert item["moving"].shape == item["fixed"].shape == (2, 16, 12, 14) and item["fixed_label"].shape[0] == 1
    inside = (slice(2, -2), slice(1, -1), slice(None))
    for role, name in (("moving", "atlas"), ("fixed", "imagesTr/fdg_a_9")):
        ct, pet = (nib.load(folder / f"{name}_{k:04d}.nii.gz").get_fdata() for k in (0, 1))
        np.testing.assert_allclose(item[role][0][inside], (ct.clip(-300, 300) + 300) / 600, atol=1e-6)
        np.testing.assert_allclose(item[role][1][inside], pet.clip(0, 15) / 15, atol=1e-6)
    raw = nib.load(folder / "labelsTr/fdg_a_9.nii.gz").get_fdata()
    label = item["fixed_label"][0][inside].numpy()
    assert set(np.unique(label)) <= set(range(40)) and label.dtype == np.int32
    for value, merged in ((13, 13), (14, 13), (30, 15), (52, 0), (93, 0), (85, 29), (104, 39)):
        assert (label[raw == value] == merged).all()


def test_a_batch_of_two_channels_is_registered_and_measured(cohort: Cohort) -> None:
    transform = scan_transforms(orientation=None, intensity=WINDOWS, channels=2, label_map=cohort.label_map)
    batch = default_collate([PairDataset(cohort.test, strategy="listed", transform=transform)[0]])
    assert stack_pair(batch).shape == (1, 4, *SHAPE)
    values = PairValues(batch, {"ddf": torch.zeros(1, 3, *SHAPE)})
    measured = standard_measures(cohort.evaluation_labels)(values)
    assert measured["dice"].shape == (1, 39) and values["moved"].shape == (1, 2, *SHAPE)
    one_by_one = [LNCC()(batch["moving"][:, k : k + 1], batch["fixed"][:, k : k + 1]) for k in (0, 1)]
    torch.testing.assert_close(LNCC()(batch["moving"], batch["fixed"]), torch.stack(one_by_one).mean())


def described(folder: Path, repository: Path) -> Cohort:
    """The cohort with the size of these images in place of the real one."""
    content = json.loads((repository / "data_splits/autopet.json").read_text()) | {"shape": SHAPE}
    (folder / "mine.json").write_text(json.dumps(content))
    return load_cohort(folder / "mine.json")


def test_integrity_reads_both_channels_and_the_labels_of_the_files(folder: Path, repository: Path) -> None:
    report = check_integrity(described(folder, repository))
    assert report.images == 6 and not report.problems
    second = folder / "imagesTr/fdg_b_1_0001.nii.gz"
    kept = second.read_bytes()
    for array, affine, reason in (
        (np.zeros((4, 4, 4), np.float32), AFFINE, "not on the grid of its first channel"),
        (np.zeros(SHAPE, np.float32), AFFINE, "constant image"),
        (np.full(SHAPE, np.nan, np.float32), AFFINE, "NaN"),
    ):
        write(second, array, affine)
        with pytest.raises(IntegrityError, match=rf"fdg_b_1_0001.nii.gz: .*{reason}"):
            check_integrity(described(folder, repository))
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"fdg_b_1_0001\.nii\.gz"):
        described(folder, repository)
    second.write_bytes(kept)


def test_a_user_may_list_channels_pair_by_pair(folder: Path, tmp_path: Path) -> None:
    names = {
        role: [f"images{s}/{n}_000{k}.nii.gz" for k in (0, 1)]
        for role, s, n in (("moving", "Tr", "fdg_b_1"), ("fixed", "Val", "fdg_c_1"))
    }
    pair = {role: paths[0] for role, paths in names.items()}
    pair |= {f"{role}_channels": paths[1:] for role, paths in names.items()}
    (tmp_path / "mine.json").write_text(json.dumps({"training": [pair], "test": [pair]}))
    cohort = load_cohort(tmp_path / "mine.json", folder)
    transform = scan_transforms(intensity="percentile", channels=2, allow_missing_keys=True)
    item = PairDataset(cohort.test, strategy="listed", transform=transform)[0]
    assert item["moving"].shape == (2, *SHAPE)
    for channel in item["moving"]:
        assert (float(channel.min()), float(channel.max())) == (0.0, 1.0), "each channel is scaled by itself"
