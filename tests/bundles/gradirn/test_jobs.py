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
"""The commands a user types, on the smallest data they run on."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data.cine import make_cine_pair
from common.io import load_field, load_image, save_image
from common.spatial import warp
from tests.bundles.commands import run_bundle, succeed, weights

run = partial(run_bundle, "gradirn")
TINY = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def mean(folder: Path, column: str) -> float:
    return float(np.mean([float(row[column]) for row in rows(folder)]))


@pytest.fixture(scope="module")
def trained(repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    options = {"dataset_dir": cache, "max_epochs": 1, "epoch_length": 4, "val_interval": 1, **TINY}
    succeed(run(repository, "train", output_dir=folder, **options))
    return folder


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short-axis stacks of four hearts with the file names of UK Biobank; the third has no structure at its base."""
    root = tmp_path_factory.mktemp("ukbb")
    affine = np.array(
        [[0.0, 1.8, 0, 3], [1.2, 0, -4.8, -7], [0.9, 0, 6.4, 2], [0, 0, 0, 1]]
    )  # oblique, x and y exchanged
    for number in range(4):
        slices = [make_cine_pair((40, 44), subject=number, level=level) for level in (-1, -0.5, 0, 0.5, 1)]
        for phase, image, label in (("ED", "fixed", "fixed_label"), ("ES", "moving", "moving_label")):
            intensities = np.stack([getattr(each, image).numpy() * 700 for each in slices], -1)
            labels = np.stack([getattr(each, label).numpy() for each in slices], -1)
            labels[..., -1] *= number != 2
            folder = root / f"subject{number}"
            save_image(folder / f"sa_{phase}.nii.gz", intensities.astype(np.int16), affine)
            save_image(folder / f"label_sa_{phase}.nii.gz", labels, affine)
    return root


def test_training_leaves_weights_pictures_a_table_and_logs(trained: Path) -> None:
    state = weights(trained / "model.pt")
    assert any(name.startswith("levels.") for name in state)
    assert len(list((trained / "pictures").glob("*.png"))) == 2 and list(trained.glob("events*"))
    table = rows(trained)
    assert len(table) == 8
    assert {"dice_1", "dice_3", "dice_mean", "rmse", "rmse_before", "mean_jacobian", "folds", "sdlogj"} <= set(table[0])
    assert mean(trained, "rmse") < mean(trained, "rmse_before")


def test_evaluation_has_a_column_for_each_structure_and_shifts_are_seen(
    repository: Path, trained: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": cache, "checkpoint": trained / "model.pt", "pictures": 1, **TINY}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "plain", **options))
    options |= {"pictures": 0, "shift": "inverted", "shift_of": "moving", "surface": False}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "inverted", **options))
    plain, inverted = rows(tmp_path / "plain"), rows(tmp_path / "inverted")
    assert len(plain) == 16 and (tmp_path / "plain/summary.csv").is_file()
    for measure in ("dice", "hd", "hd95", "asd", "hd_before"):
        assert {f"{measure}_{column}" for column in ("1", "2", "3", "mean")} <= set(plain[0])
    assert all(float(row["hd95_mean"]) <= float(row["hd_mean"]) for row in plain)
    assert "hd_1" not in inverted[0]
    for before, after in zip(plain, inverted, strict=True):
        assert before["dice_before_mean"] == after["dice_before_mean"], "labels are not shifted"
        assert float(after["rmse_before"]) > 2 * float(before["rmse_before"])


def test_stacks_train_by_slices_and_are_measured_as_a_whole(repository: Path, hearts: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": hearts, "spatial_size": [32, 48]}
    tiny = {"max_epochs": 1, "epoch_length": 2, "batch_size": 2, "num_workers": 0, "val_interval": 1, "amp": False}
    succeed(run(repository, "train", "paper_ukbb", output_dir=tmp_path / "train", **options, **tiny))
    (row,) = rows(tmp_path / "train")
    assert row["moving_id"].endswith("_ES") and float(row["dice_before_mean"]) > 0.3
    checkpoint = {"checkpoint": tmp_path / "train/model.pt", "pictures": 1}
    options |= {"dataset": "ukbb", "complete_slices": True, "shift": "noise", "split": "training_pairs"}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "test", **options, **checkpoint))
    table = rows(tmp_path / "test")
    assert len(table) == 2 and all(0 < float(r["hd_mean"]) < 60 and float(r["dice_mean"]) > 0.3 for r in table)
    assert len(list((tmp_path / "test/pictures").glob("*.png"))) == 1


def test_two_stacks_register_in_plane_on_the_grid_of_the_file(
    repository: Path, trained: Path, hearts: Path, tmp_path: Path
) -> None:
    scans = {key: hearts / f"subject1/sa_{phase}.nii.gz" for key, phase in (("moving", "ES"), ("fixed", "ED"))}
    label = hearts / "subject1/label_sa_ES.nii.gz"
    options = {"checkpoint": trained / "model.pt", "stacks": True, "moving_label": label}
    succeed(run(repository, "inference", output_dir=tmp_path, **scans, **options))
    moved, fixed, moving = (load_image(p) for p in (tmp_path / "moved.nii.gz", scans["fixed"], scans["moving"]))
    assert moved.array.shape == fixed.array.shape == (40, 44, 5) and np.allclose(moved.affine, fixed.affine)
    ddf = torch.as_tensor(load_field(tmp_path / "ddf.nii.gz", fixed.affine, moving.affine)).reshape(1, 3, 40, 44, 5)
    assert float(ddf[:, 2].abs().max()) < 1e-4 < float(ddf[:, :2].abs().max())
    again = warp(torch.from_numpy(moving.array.astype(np.float32))[None, None], ddf, padding="zeros")
    assert np.allclose(again[0, 0].numpy(), moved.array, atol=1.0)  # of 700
    before, after = (np.square(a - fixed.array.astype(float)).mean() for a in (moving.array, moved.array))
    assert after < 0.9 * before
    assert json.loads((tmp_path / "metrics.json").read_text())["folds"][0] < 5


def test_without_weights_it_is_gradient_descent(repository: Path, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "pictures": 0, "surface": False, **TINY}
    succeed(run(repository, "evaluate", output_dir=tmp_path, checkpoint=False, **options))
    assert mean(tmp_path, "rmse") < 0.95 * mean(tmp_path, "rmse_before")
    assert mean(tmp_path, "dice_mean") > mean(tmp_path, "dice_before_mean")


def test_volumes_deep_supervision_and_the_baseline(repository: Path, cache: Path, tmp_path: Path) -> None:
    volumes = {"dataset": "synthetic", "dataset_dir": cache, "cohort#spatial_size": 18, "spatial_size": [17, 18, 19]}
    tiny = {"max_epochs": 1, "epoch_length": 1, "batch_size": 1, "val_interval": 1}
    options = {**volumes, **tiny, "levels": 2, "steps": [1, 2], "similarity": "lncc", "lncc_window": 5}
    text = succeed(run(repository, "train", output_dir=tmp_path / "deep", deep_supervision=0.5, **options))
    assert "deep_supervision" in text and len(rows(tmp_path / "deep")) == 6
    succeed(run(repository, "train", "vm", output_dir=tmp_path / "vm", **volumes, **tiny, train_count=4))
    options = {
        **volumes,
        "checkpoint": tmp_path / "vm/model.pt",
        "shift": "gamma",
        "pictures": 0,
        "split": "validation",
    }
    succeed(run(repository, "evaluate", "vm", output_dir=tmp_path / "test", **options))
    assert len(rows(tmp_path / "test")) == 6


def test_data_behind_an_application_say_where_to_apply(repository: Path, tmp_path: Path) -> None:
    result = run(repository, "train", dataset="ukbb", output_dir=tmp_path)
    assert result.returncode != 0
    assert "'ukbb' needs dataset_dir" in result.stdout + result.stderr
    assert "apply at https://www.ukbiobank.ac.uk" in result.stdout + result.stderr
