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

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.io import load_field, load_image
from common.spatial import compose
from tests.bundles.commands import rows, run_bundle, succeed, weights

run = partial(run_bundle, "dual_stream_pyramid")
TINY = {"encoder_channels": [4, 4, 4, 8, 8], "decoder_channels": [4, 4, 4, 8, 8]}
SHORT = {"max_epochs": 1, "epoch_length": 2, "val_interval": 1, **TINY}


@pytest.fixture(scope="module")
def trained(repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    text = succeed(run(repository, "train", output_dir=folder, dataset_dir=cache, spatial_size=[24, 20, 24], **SHORT))
    assert "inverse_similarity" in text  # both directions are judged, each under its name
    return folder


def test_training_leaves_weights_pictures_and_a_table(trained: Path) -> None:
    assert any(name.startswith("decoder.heads") for name in weights(trained / "model.pt"))
    assert list((trained / "pictures").glob("*.png")) and list(trained.glob("events*"))
    assert float(rows(trained / "metrics.csv")[0]["dice_before_mean"]) > 0


def test_evaluation_measures_both_fields_by_both_definitions(
    repository: Path, trained: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": cache, "spatial_size": [24, 24, 24], "checkpoint": trained / "model.pt", **TINY}
    succeed(
        run(repository, "evaluate", output_dir=tmp_path, definition="both", fields_dir=tmp_path / "fields", **options)
    )
    table = rows(tmp_path / "metrics.csv")
    assert len(table) > 1
    for name in ("dice_mean", "dice_l2r_mean", "inverse_consistency", "seconds"):
        assert float(table[0][name]) >= 0, name
    assert len(list((tmp_path / "fields").glob("disp_*_*.nii.gz"))) == len(table)


def test_two_scans_of_any_size_are_registered_there_and_back(
    repository: Path, trained: Path, cache: Path, tmp_path: Path
) -> None:
    moving, fixed = sorted(path for path in cache.rglob("*.nii.gz") if "label" not in str(path))[:2]
    scans = {"moving": moving, "fixed": fixed, "checkpoint": trained / "model.pt", **TINY}
    succeed(run(repository, "inference", output_dir=tmp_path, field_format="l2r", **scans))
    assert load_image(tmp_path / "inverse_moved.nii.gz").array.shape == load_image(moving).array.shape
    there, back = (load_field(tmp_path / f"{name}.nii.gz", fmt="l2r") for name in ("ddf", "inverse_ddf"))
    assert there.abs().max() > 0
    assert compose(there, back)[..., 4:-4, 4:-4, 4:-4].abs().max() < 0.1
    assert (tmp_path / "registration.png").exists()


def test_random_images_alone_train_in_two_dimensions_and_register(
    repository: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"decoder": "conv_c", "spatial_size": [37, 30], "validation_pairs": 1, **SHORT}
    succeed(run(repository, "train", "random_images", output_dir=tmp_path / "train", **options))
    assert float(rows(tmp_path / "train/metrics.csv")[0]["epe"]) > 0
    data = {"dataset_dir": cache / "2d", "spatial_size": [40, 45], "checkpoint": tmp_path / "train/model.pt", **TINY}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "evaluate", decoder="conv_c", pictures=0, **data))
    assert np.isfinite(float(rows(tmp_path / "evaluate/metrics.csv")[0]["similarity"]))


def test_a_dataset_has_no_effect_on_training_with_random_images(repository: Path, tmp_path: Path) -> None:
    result = run(repository, "train", "random_images", output_dir=tmp_path, dataset_dir=tmp_path, **SHORT)
    assert result.returncode != 0 and "--dataset_dir has no effect" in result.stdout + result.stderr


@pytest.mark.parametrize("decoder", ["conv_mfc", "vfa"])
def test_labels_and_the_fields_on_the_way_can_be_judged_too(
    repository: Path, decoder: str, cache: Path, tmp_path: Path
) -> None:
    options = {"decoder": decoder, "dataset_dir": cache, "spatial_size": [24, 24, 24], "amp": "bf16", **SHORT}
    text = succeed(run(repository, "train", output_dir=tmp_path, dice_weight=0.5, deep_supervision=0.5, **options))
    log = next(line for line in text.splitlines() if "train epoch 1/1" in line)
    assert "dice" in log and "deep_supervision" in log and "inverse" not in log


def test_the_encoder_starts_from_what_ssl_pretrain_leaves(repository: Path, cache: Path, tmp_path: Path) -> None:
    pretrain = {"encoder": "dual_stream", "preset": "base", "spatial_size": [16, 16, 16], "max_epochs": 1}
    pretrain |= {"output_dir": tmp_path / "pretrain", "pairs_per_epoch": 1, "validation_pairs": 1}
    succeed(run_bundle("ssl_pretrain", repository, "train", **pretrain))
    options = {"max_epochs": 1, "epoch_length": 1, "decoder": "vfa", "spatial_size": [16, 16, 16], "val_interval": 1}
    start = tmp_path / "pretrain/model.pt"
    succeed(run(repository, "train", output_dir=tmp_path / "train", dataset_dir=cache, pretrained=start, **options))
    before, after = weights(start), weights(tmp_path / "train/model.pt")
    shared = [name for name in after if name.startswith("encoder.")]
    assert shared and all((before[name] - after[name]).abs().max() < 1e-3 for name in shared)


@pytest.mark.parametrize("baseline", ["voxelmorph", "vfa"])
def test_a_baseline_trains_by_the_same_command(repository: Path, baseline: str, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "spatial_size": [16, 18, 20], "max_epochs": 1, "epoch_length": 1}
    succeed(run(repository, "train", baseline, output_dir=tmp_path, val_interval=1, **options))
    assert weights(tmp_path / "model.pt")


def test_a_run_resumes_on_the_same_schedule(repository: Path, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "spatial_size": [16, 16, 16], "decoder": "conv_c", **SHORT, "restart_epochs": 2}
    whole = {**options, "max_epochs": 2}
    succeed(run(repository, "train", output_dir=tmp_path / "whole", **whole))
    succeed(run(repository, "train", output_dir=tmp_path / "parts", **options))
    succeed(run(repository, "train", output_dir=tmp_path / "parts", resume=True, **whole))
    once, twice = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    for name in once:
        torch.testing.assert_close(once[name], twice[name], atol=1e-5, rtol=1e-4)
