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

import nibabel as nib
import numpy as np
import pytest
import torch

from common.io import load_field, load_image
from common.spatial import warp
from tests.bundles.commands import run_bundle, succeed, weights

run = partial(run_bundle, "ssl_pretrain")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def pretrained(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    succeed(
        run(
            repository,
            "train",
            output_dir=folder,
            spatial_size=[24, 20, 22],
            pairs_per_epoch=2,
            validation_pairs=1,
            max_epochs=2,
        )
    )
    return folder


@pytest.fixture(scope="module")
def finetuned(repository: Path, pretrained: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    result = run(
        repository,
        "finetune",
        output_dir=folder,
        dataset_dir=cache,
        spatial_size=[24, 24, 24],
        pretrained=pretrained / "model.pt",
        max_epochs=1,
        epoch_length=2,
        val_interval=1,
    )
    assert "loaded" in succeed(result)
    return folder


def test_pretraining_leaves_weights_pictures_a_table_and_logs(pretrained: Path) -> None:
    state = weights(pretrained / "model.pt")
    assert any(name.startswith("encoder.") for name in state)
    assert len(list((pretrained / "pictures").glob("*.png"))) == 2
    assert list(pretrained.glob("events*"))
    with open(pretrained / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 and 0 < float(rows[0]["dice_before_mean"]) < 1 and float(rows[0]["epe"]) > 0


def test_fine_tuning_starts_from_the_pretrained_encoder(repository: Path, pretrained: Path, finetuned: Path) -> None:
    start, end = weights(pretrained / "model.pt"), weights(finetuned / "model.pt")
    shared = [name for name in end if name.startswith("encoder.") and name in start]
    assert len(shared) == sum(name.startswith("encoder.") for name in end)
    # Two steps at 1e-3 move a weight by no more than 2e-3: what is closer than that was loaded.
    assert all((start[name] - end[name]).abs().max() < 3e-3 for name in shared)


def test_fine_tuning_goes_on_from_a_whole_network(
    repository: Path, finetuned: Path, cache: Path, tmp_path: Path
) -> None:
    options = {
        "dataset_dir": cache,
        "spatial_size": [24, 24, 24],
        "max_epochs": 1,
        "epoch_length": 1,
        "val_interval": 1,
    }
    succeed(run(repository, "finetune", output_dir=tmp_path, checkpoint=finetuned / "model.pt", **options))
    start, end = weights(finetuned / "model.pt"), weights(tmp_path / "model.pt")
    assert all((start[name] - end[name]).abs().max() < 3e-3 for name in start)


def test_weights_of_another_encoder_are_refused_by_name(
    repository: Path, pretrained: Path, cache: Path, tmp_path: Path
) -> None:
    result = run(
        repository,
        "finetune",
        output_dir=tmp_path,
        dataset_dir=cache,
        encoder="voxelmorph",
        pretrained=pretrained / "model.pt",
        max_epochs=1,
        epoch_length=1,
    )
    assert result.returncode != 0
    assert "does not fit `encoder` and `preset` of this run" in result.stdout + result.stderr


def test_evaluation_writes_a_row_a_pair_with_surface_distances(
    repository: Path, finetuned: Path, cache: Path, tmp_path: Path
) -> None:
    succeed(
        run(
            repository,
            "evaluate",
            output_dir=tmp_path,
            dataset_dir=cache,
            checkpoint=finetuned / "model.pt",
            split="validation",
            pictures=1,
        )
    )
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 1
    assert {"moving_id", "fixed_id", "dice_mean", "dice_before_mean", "hd95_mean", "asd_mean", "ndv", "sdlogj"} <= set(
        rows[0]
    )
    assert (tmp_path / "summary.csv").is_file()


def test_two_scans_of_different_shape_and_orientation_register_on_the_fixed_grid(
    repository: Path, finetuned: Path, tmp_path: Path
) -> None:
    axes = np.meshgrid(*[np.arange(n) for n in (25, 22, 19)], indexing="ij")
    blob = np.exp(-sum(((a - c) / 5.0) ** 2 for a, c in zip(axes, (12, 11, 9), strict=True))) * 900
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    nib.save(nib.Nifti1Image(blob.astype(np.int16), flip), tmp_path / "a scan.nii.gz")
    nib.save(nib.Nifti1Image(blob[2:, 1:-2].astype(np.float32), np.eye(4)), tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image((blob > 400).astype(np.uint8), flip), tmp_path / "label.nii.gz")
    output = tmp_path / "out put"
    succeed(
        run(
            repository,
            "inference",
            output_dir=output,
            moving=tmp_path / "a scan.nii.gz",
            fixed=tmp_path / "b.nii.gz",
            moving_label=tmp_path / "label.nii.gz",
            checkpoint=finetuned / "model.pt",
        )
    )
    moved, fixed, moving = (
        load_image(p) for p in (output / "moved.nii.gz", tmp_path / "b.nii.gz", tmp_path / "a scan.nii.gz")
    )
    assert moved.array.shape == fixed.array.shape and np.allclose(moved.affine, fixed.affine)
    ddf = torch.as_tensor(load_field(output / "ddf.nii.gz", fixed.affine, moving.affine))
    again = warp(
        torch.from_numpy(moving.array.astype(np.float32))[None, None],
        ddf.reshape(1, 3, *fixed.array.shape),
        padding="zeros",
    )
    assert np.allclose(again[0, 0].numpy(), moved.array, atol=0.5)  # of 900: the file is the warp by the file
    label = load_image(output / "moved_label.nii.gz").array
    assert set(np.unique(label)) == {0, 1}
    assert (output / "registration.png").stat().st_size > 10_000
    assert 0 <= json.loads((output / "metrics.json").read_text())["similarity"][0] <= 1


def test_a_missing_scan_is_named(repository: Path, finetuned: Path, tmp_path: Path) -> None:
    result = run(
        repository,
        "inference",
        output_dir=tmp_path,
        moving=tmp_path / "nowhere.nii.gz",
        checkpoint=finetuned / "model.pt",
    )
    assert result.returncode != 0 and "nowhere.nii.gz" in result.stderr


def test_an_interrupted_run_resumes_to_the_same_weights(repository: Path, tmp_path: Path) -> None:
    tiny = {"spatial_size": [16, 16, 16], "pairs_per_epoch": 2, "validation_pairs": 1}
    succeed(run(repository, "train", output_dir=tmp_path / "whole", max_epochs=3, **tiny))
    # A run that stops after two of three epochs: the schedule is the three-epoch one all along.
    half = {"lr_scheduler#total_iters": 3, **tiny}
    succeed(run(repository, "train", output_dir=tmp_path / "half", max_epochs=2, **half))
    succeed(
        run(repository, "train", output_dir=tmp_path / "rest", max_epochs=3, resume=tmp_path / "half/last.pt", **tiny)
    )
    whole = weights(tmp_path / "whole/last.pt")["model"]
    rest = weights(tmp_path / "rest/last.pt")["model"]
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


@pytest.mark.parametrize("encoder", ["dual_stream", "voxelmorph", "vfa"])
def test_other_encoders_pretrain_and_fine_tune_in_two_dimensions(
    repository: Path, encoder: str, cache: Path, tmp_path: Path
) -> None:
    options = {"encoder": encoder, "max_epochs": 1}
    pretrain = {"spatial_size": [37, 30], "pairs_per_epoch": 2, "validation_pairs": 1}
    succeed(run(repository, "train", output_dir=tmp_path / "pretrain", **pretrain, **options))
    finetune = {"spatial_size": [40, 45], "epoch_length": 1, "dataset_dir": cache / "2d", "val_interval": 1}
    weights_file = tmp_path / "pretrain/model.pt"
    succeed(
        run(repository, "finetune", output_dir=tmp_path / "finetune", pretrained=weights_file, **finetune, **options)
    )
    moving, fixed = sorted((cache / "2d").rglob("*.nii.gz"))[:2]
    scans = {"moving": moving, "fixed": fixed, "checkpoint": tmp_path / "finetune/model.pt", "encoder": encoder}
    succeed(run(repository, "inference", output_dir=tmp_path / "registered", **scans))
    assert load_image(tmp_path / "registered/moved.nii.gz").array.ndim == 2


def test_a_plain_decathlon_folder_trains_with_subjects_set_aside(
    repository: Path, finetuned: Path, cache: Path, tmp_path: Path
) -> None:
    images = sorted(path for path in cache.rglob("*.nii.gz") if "label" not in str(path) and "2d" not in str(path))[:5]
    listing = {"name": "mine", "training": [{"image": str(path)} for path in images]}
    (tmp_path / "dataset.json").write_text(json.dumps(listing))
    options = {"datalist": tmp_path / "dataset.json", "dataset_dir": tmp_path, "spatial_size": [24, 24, 24]}
    text = succeed(
        run(repository, "finetune", output_dir=tmp_path, max_epochs=1, epoch_length=1, val_interval=1, **options)
    )
    assert "set aside" in text and "best similarity" in text
