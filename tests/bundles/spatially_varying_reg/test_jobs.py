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
"""The commands of the documentation, as a user types them, on images that are small enough for a test."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.sliding import make_sliding_pair
from common.io import load_field, load_image, save_image
from common.spatial import compose, warp
from tests.bundles.commands import mean, rows, run_bundle, succeed, weights

run = partial(run_bundle, "spatially_varying_reg")
SMALL = {"embed_dim": 16, "num_heads": [2, 2, 2], "window_size": 2, "steps": 2}
DATA = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}
SHORT = {"epoch_length": 2, "batch_size": 2, "val_interval": 1, "train_count": 4, **SMALL}


@pytest.fixture(scope="module")
def trained(repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    options = {"dataset_dir": cache, "max_epochs": 2, "learning_rate": 0.003, **DATA, **SHORT}
    succeed(run(repository, "train", output_dir=folder, **options))
    return folder


@pytest.fixture(scope="module")
def hyper(repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hyper")
    options = {"dataset_dir": cache, "max_epochs": 1, "learning_rate": 0.003, "rank": 2, **DATA, **SHORT}
    text = succeed(run(repository, "train", "hyper", output_dir=folder, **options))
    assert "smoothness" in text and "prior" in text
    return folder


def test_training_leaves_weights_pictures_and_a_table_with_the_truth(trained: Path) -> None:
    assert any(name.startswith("weight_head.") for name in weights(trained / "model.pt"))
    assert len(list((trained / "pictures").glob("*.png"))) == 4 and list(trained.glob("events*"))
    table = rows(trained / "metrics.csv")
    assert len(table) == 8 and {"dice_mean", "ndv", "sdlogj", "epe", "tre", "tre_before"} <= set(table[0])
    assert all(0 < float(row["weight"]) < 1 for row in table)


def test_a_run_resumes_to_the_same_result(repository: Path, trained: Path, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "learning_rate": 0.003, "lr_scheduler#total_iters": 2, **DATA, **SHORT}
    succeed(run(repository, "train", output_dir=tmp_path, max_epochs=1, **options))
    succeed(run(repository, "train", output_dir=tmp_path, max_epochs=2, resume=True, **options))
    once, twice = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (trained, tmp_path))
    for name in once:
        torch.testing.assert_close(once[name], twice[name], atol=1e-5, rtol=1e-4)


def test_a_hyper_network_is_validated_over_its_range(hyper: Path) -> None:
    table = rows(hyper / "metrics.csv")
    alphas, strengths = ([float(row[name]) for row in table] for name in ("alpha", "w"))
    assert (alphas[0], strengths[0]) == pytest.approx((1.1, 2.5)) and len(set(alphas)) == len(set(strengths)) == 8
    assert min(alphas) < 1.05 and max(alphas) > 1.15 and min(strengths) < 1 and max(strengths) > 4


def test_evaluation_is_at_the_hyper_parameters_asked_for(
    repository: Path, hyper: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": cache, "checkpoint": hyper / "model.pt", "pictures": 1, "rank": 2, **DATA, **SMALL}
    text = succeed(run(repository, "evaluate", "hyper", output_dir=tmp_path, alpha=1.15, w=6, **options))
    assert "w [6.0] is outside the trained range [0, 5]" in text
    table = rows(tmp_path / "metrics.csv")
    assert len(table) == 16 and len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert {row["w"] for row in table} == {"6"} and mean(tmp_path, "alpha") == pytest.approx(1.15)
    assert all(float(row["hd95_mean"]) >= 0 and float(row["seconds"]) > 0 for row in table)


def test_hyper_parameters_are_found_on_validation_pairs(
    repository: Path, hyper: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": cache, "checkpoint": hyper / "model.pt", "rank": 2, **DATA, **SMALL}
    options |= {"grid": 2, "refinements": 1, "early_fraction": 0.25, "max_ndv": 1}
    text = succeed(run(repository, "tune", output_dir=tmp_path, **options))
    best = json.loads((tmp_path / "best.json").read_text())
    table = rows(tmp_path / "landscape.csv")
    # Four corners, on two of eight pairs at first, and at least three neighbours of the best of them.
    assert len(table) == best["points"] >= 7 and {row["cases"] for row in table} == {"2", "8"}
    assert best["registrations"] == sum(int(row["cases"]) for row in table)
    assert 1 <= best["alpha"] <= 1.2 and 0 <= best["w"] <= 5 and best["allowed"]
    assert (tmp_path / "landscape.png").stat().st_size > 10_000
    assert ("touches the" in text) == bool(best["at_border"])


def test_two_scans_of_any_size_are_registered_there_and_back(repository: Path, hyper: Path, tmp_path: Path) -> None:
    pair = make_sliding_pair((45, 37), subject=3)
    affine = np.diag([-1.5, 1.5, 1.0, 1.0])
    scans = {}
    for role in ("moving", "fixed"):
        scans[role] = tmp_path / f"{role}.nii.gz"
        save_image(scans[role], (getattr(pair, role).numpy() * 900).astype(np.int16), affine)
    scans["moving_label"] = tmp_path / "label.nii.gz"
    save_image(scans["moving_label"], pair.moving_label.numpy(), affine)
    options: dict[str, Any] = {"checkpoint": hyper / "model.pt", "rank": 2, "inverse": True, "alpha": 1.05, "w": 1.0}
    out = tmp_path / "out"
    succeed(run(repository, "inference", "hyper", output_dir=out, field_format="l2r", **scans, **options, **SMALL))
    weight, moved, fixed = (
        load_image(path) for path in (out / "weight_map.nii.gz", out / "moved.nii.gz", scans["fixed"])
    )
    for found in (weight, moved):
        assert found.array.shape == (45, 37) and np.allclose(found.affine, fixed.affine)
    assert 0 < weight.array.min() < weight.array.max() <= 1
    there, back = (load_field(out / f"{name}.nii.gz", fmt="l2r") for name in ("ddf", "inverse_ddf"))
    # No inverse at all would leave the length of the field, and the field itself in its place twice that.
    residual = compose(there, back)[..., 3:-3, 3:-3].norm(dim=1)
    assert 0 < residual.mean() < 0.1 * there[..., 3:-3, 3:-3].norm(dim=1).mean()
    moving = torch.from_numpy(load_image(scans["moving"]).array.astype(np.float32))[None, None]
    assert np.allclose(warp(moving, there, padding="zeros")[0, 0].numpy(), moved.array, atol=1.0)  # of 900
    assert {"moved_label.nii.gz", "inverse_moved.nii.gz", "registration.png"} <= {path.name for path in out.iterdir()}
    measured = json.loads((out / "metrics.json").read_text())
    assert measured["alpha"] == pytest.approx([1.05]) and measured["w"] == [1.0] and 0 < measured["weight"][0] < 1


def test_volumes_both_directions_and_the_gaussian_prior(repository: Path, cache: Path, tmp_path: Path) -> None:
    data = {"dataset": "synthetic", "dataset_dir": cache, "cohort#spatial_size": 18, "spatial_size": [17, 18, 19]}
    options = {**data, **SHORT, "max_epochs": 1, "downsample": [2, 2, 1], "batch_size": 1}
    options |= {"both_directions": True, "flip_probability": 0.5, "amp": "bf16", "sigma": 0.3}
    text = succeed(run(repository, "train", "gaussian", output_dir=tmp_path, smoothness_spacing=[1, 1, 2], **options))
    log = next(line for line in text.splitlines() if "train epoch 1/1" in line)
    assert all(name in log for name in ("inverse_similarity", "inverse_smoothness", "prior"))
    assert len(rows(tmp_path / "metrics.csv")) == 6 and weights(tmp_path / "model.pt")


def test_a_misspelt_option_is_refused(repository: Path, tmp_path: Path) -> None:
    result = run(repository, "tune", output_dir=tmp_path / "out", max_nvd=0.1)
    text = result.stdout + result.stderr
    assert result.returncode != 0 and "--max_nvd is no key" in text and "did you mean --max_ndv?" in text
