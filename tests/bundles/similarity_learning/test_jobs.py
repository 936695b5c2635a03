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

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.contrast import make_contrast_pair
from common.io import load_field, load_image, save_image
from common.spatial import warp
from tests.bundles.commands import mean, rows, run_bundle, succeed, weights

run = partial(run_bundle, "similarity_learning")
TINY: dict[str, Any] = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}
FEW: dict[str, Any] = {"iterations": 8, "first_iterations": 16, "val_iterations": 16, "samples": 4, "steps": 5}
SHORT: dict[str, Any] = {"max_epochs": 1, "epoch_length": 2, "batch_size": 2, "val_interval": 1}
CONVOLUTIONS = {f"similarity.encoder.convolutions.{n}.{part}" for n in range(3) for part in ("weight", "bias")}
LEARNT = CONVOLUTIONS | {"similarity.encoder.aggregation.weight"}


@pytest.fixture(scope="module")
def trained(repository: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    succeed(run(repository, "train", dataset_dir=cache, output_dir=folder, **TINY, **SHORT, **FEW))
    return folder


@pytest.fixture(scope="module")
def voxelmorph(repository: Path, cache: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VoxelMorph, trained with the learnt similarity."""
    folder = tmp_path_factory.mktemp("vxm")
    options = {"learnt": True, "similarity_checkpoint": trained / "model.pt", **TINY, **SHORT}
    succeed(run(repository, "train_vxm", dataset_dir=cache, output_dir=folder, **options))
    return folder


def test_training_leaves_a_similarity_pictures_a_table_and_logs(trained: Path) -> None:
    state = weights(trained / "model.pt")
    assert set(state) == LEARNT
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert len(list((trained / "pictures").glob("*.png"))) == 2 and list(trained.glob("events*"))
    table = rows(trained / "metrics.csv")
    assert len(table) == 6 and {row["fixed_id"] for row in table} == {"contrast_atlas"}
    assert {"dice_1", "dice_7", "dice_mean", "epe", "energy", "uncertainty", "rank_label"} <= set(table[0])
    assert mean(trained, "uncertainty") > 0
    assert len(torch.load(trained / "last.pt", weights_only=True)["store"]) > 0


def test_a_run_that_is_resumed_ends_where_one_in_one_piece_does(repository: Path, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "train_count": 3, "store": "disk", "val_interval": 9, **TINY, **FEW}
    options |= {"batch_size": 2, "iterations": 4, "first_iterations": 6, "val_iterations": 3}
    for folder, epochs in (("whole", (2,)), ("halves", (1, 2))):
        for last in epochs:
            resume = {"resume": True, "max_epochs": last}
            succeed(run(repository, "train", output_dir=tmp_path / folder, **options, **resume))
    whole, halves = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halves"))
    for part in ("model", "image_posterior"):
        assert set(whole[part]) == set(halves[part])
        assert all(torch.equal(whole[part][name], halves[part][name]) for name in whole[part]), part
    assert len(list((tmp_path / "whole/posteriors").glob("*.pt"))) == 3


def test_evaluation_measures_registration_and_its_uncertainty(
    repository: Path, trained: Path, cache: Path, tmp_path: Path
) -> None:
    options = {"dataset_dir": cache, "split": "validation", **TINY, "iterations": 60, "samples": 4}
    text = succeed(
        run(repository, "evaluate", output_dir=tmp_path / "learnt", checkpoint=trained / "model.pt", **options)
    )
    options |= {"pictures": 0, "surface": False, "learnt": False, "checkpoint": False}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "plain", **options))
    table = rows(tmp_path / "learnt/metrics.csv")
    assert len(table) == 6 and (tmp_path / "learnt/calibration.png").stat().st_size > 10_000
    assert {row["kind"] for row in rows(tmp_path / "learnt/calibration.csv")} == {"displacement", "label"}
    assert "rank correlation" in text
    for measure in ("dice", "dice_before", "hd95", "asd"):
        assert {f"{measure}_{column}" for column in ("1", "7", "mean")} <= set(table[0])
    assert {"rank_epe", "label_std_mean", "label_entropy", "label_ece", "seconds", "energy"} <= set(table[0])
    for folder in ("learnt", "plain"):
        assert mean(tmp_path / folder, "dice_mean") > mean(tmp_path / folder, "dice_before_mean")
        assert mean(tmp_path / folder, "folds") < 0.1
    assert mean(tmp_path / "learnt", "energy") != mean(tmp_path / "plain", "energy")


def test_weights_are_not_loaded_into_a_baseline(repository: Path, trained: Path, cache: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": cache, "learnt": False, "checkpoint": trained / "model.pt", **TINY}
    result = run(repository, "evaluate", output_dir=tmp_path, **options)
    assert result.returncode != 0 and "similarity.encoder" in result.stdout + result.stderr


def test_two_scans_register_on_the_grids_of_the_files(repository: Path, trained: Path, tmp_path: Path) -> None:
    """Axes in another order and direction, voxels that are no cubes, and two sizes."""
    pair = make_contrast_pair((32, 36, 34), subject=31)
    affine = np.array([[0, 2.0, 0, -3], [-1.5, 0, 0, 7], [0, 0, 1.0, 2], [0, 0, 0, 1]])
    for name in ("moving", "fixed", "moving_label"):
        array = getattr(pair, name).numpy()
        save_image(tmp_path / f"{name}.nii.gz", array[:, 2:] if name == "fixed" else array, affine)
    scans = {name: tmp_path / f"{name}.nii.gz" for name in ("moving", "fixed", "moving_label")}
    options = {"learnt": False, "checkpoint": False, "iterations": 24, "samples": 4, "inverse": True}
    succeed(run(repository, "inference", output_dir=tmp_path / "out", **scans, **options))
    moved, fixed, moving = (load_image(p) for p in (tmp_path / "out/moved.nii.gz", scans["fixed"], scans["moving"]))
    assert moved.array.shape == fixed.array.shape == (32, 34, 34) and np.allclose(moved.affine, fixed.affine)
    ddf = torch.as_tensor(load_field(tmp_path / "out/ddf.nii.gz", fixed.affine, moving.affine)).reshape(
        1, 3, 32, 34, 34
    )
    again = warp(torch.from_numpy(moving.array.astype(np.float32))[None, None], ddf, padding="zeros")
    assert np.allclose(again[0, 0].numpy(), moved.array, atol=0.02)
    for name in ("uncertainty", "label_uncertainty", "moved_label"):
        written = load_image(tmp_path / f"out/{name}.nii.gz")
        assert written.array.shape == fixed.array.shape and written.array.max() > 0, name
    assert load_image(tmp_path / "out/label_uncertainty.nii.gz").array.max() <= 0.71
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"std_ddf.nii.gz", "mean_ddf.nii.gz", "inverse_ddf.nii.gz", "registration.png"} <= left
    assert json.loads((tmp_path / "out/metrics.json").read_text())["folds"][0] < 1


def test_voxelmorph_trains_with_the_learnt_similarity_registers_and_starts_the_inner_loop(
    repository: Path, voxelmorph: Path, cache: Path, tmp_path: Path
) -> None:
    checkpoint = voxelmorph / "model.pt"
    state = weights(checkpoint)
    assert not any("similarity" in name for name in state) and state["head.conv.weight"].abs().max() > 0
    options = {"dataset_dir": cache, "split": "validation", "pictures": 0, "surface": False, **TINY}
    succeed(run(repository, "evaluate", "vxm", checkpoint=checkpoint, output_dir=tmp_path / "a", **options))
    assert "uncertainty" not in rows(tmp_path / "a/metrics.csv")[0]
    options |= {"learnt": False, "checkpoint": False, "start": checkpoint, "iterations": 3, "levels": [1]}
    succeed(run(repository, "evaluate", output_dir=tmp_path / "b", samples=2, **options))
    succeed(run(repository, "evaluate", output_dir=tmp_path / "c", samples=2, **{**options, "start": None}))
    assert mean(tmp_path / "b", "epe") != mean(tmp_path / "c", "epe")


@pytest.mark.parametrize(
    ("overlay", "options"),
    [
        ("lcc", {"rank": 2, "store": "none", "train_lcc_kernel": True}),
        ("bspline", {"control_spacing": [2, 3], "store": "disk", "integration_factor": 2}),
        ("bound", {"network_steps": 2, "masks": False, "amp": "bf16"}),
    ],
)
def test_every_overlay_trains(
    repository: Path, cache: Path, tmp_path: Path, overlay: str, options: dict[str, Any]
) -> None:
    few = {**TINY, **SHORT, **FEW, "epoch_length": 1, "val_iterations": 2, "iterations": 3}
    succeed(run(repository, "train", overlay, dataset_dir=cache, output_dir=tmp_path, **few, **options))
    expected = LEARNT | ({"similarity.kernel"} if overlay == "lcc" else set())
    assert set(weights(tmp_path / "model.pt")) == expected


def test_the_published_setting_reads_the_published_tree(repository: Path, tmp_path: Path) -> None:
    """Brains that are no cubes, int16 labels in FIRST's values, lists of pairs: whole on one grid, and registered."""
    first = np.array([0, 10, 11, 12, 13, 16, 17, 18], dtype=np.int16)
    for number in range(5):
        pair = make_contrast_pair((32, 36, 33), subject=number)
        image, label, mask = pair[1::2][:3] if number else pair[0:6:2]
        folder = tmp_path / f"ukb/images/{1000 + number}"
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        save_image(folder / "T2_FLAIR_unbiased_brain_affine_to_mni.nii.gz", image.numpy() * 900, affine)
        save_image(folder / "T1_first_all_fast_firstseg_affine_to_mni.nii.gz", first[label.numpy()], affine)
        save_image(folder / "T1_brain_mask_affine_to_mni.nii.gz", mask.numpy().astype(np.uint8), affine)
    for name, moving in (("train_biobank_1500", (1, 2)), ("val", (3,)), ("val_biobank_1500", (4,))):
        lines = [f"1000,{1000 + number}" for number in moving]
        (tmp_path / f"ukb/{name}.csv").write_text("\n".join(lines) + "\n")
    options = {"dataset_dir": tmp_path / "ukb", "spatial_size": [24, 24, 24], "steps": 4, "num_workers": 0}
    few = {"max_epochs": 1, "val_interval": 1, "iterations": 2, "first_iterations": 3, "val_iterations": 2}
    succeed(run(repository, "train", "paper_ukbb", output_dir=tmp_path / "train", **options, **few))
    (row,) = rows(tmp_path / "train/metrics.csv")
    assert (row["moving_id"], row["fixed_id"]) == ("1003", "1000")
    assert float(row["dice_10"]) > 0.3 and float(row["dice_16"]) >= 0
    assert len(list((tmp_path / "train/posteriors").glob("*.pt"))) == 2
    options |= {"checkpoint": tmp_path / "train/model.pt", "pictures": 0, "iterations": 2}
    succeed(run(repository, "evaluate", "paper_ukbb", output_dir=tmp_path / "test", **options))
    (row,) = rows(tmp_path / "test/metrics.csv")
    assert 1 < float(row["asd_before_10"]) < 20  # mm, of voxels of about 3 mm after resizing


def test_a_misspelt_option_is_refused(repository: Path, tmp_path: Path) -> None:
    result = run(repository, "train", output_dir=tmp_path, iteratons=3)
    assert result.returncode != 0 and "did you mean --iterations?" in result.stdout + result.stderr


def test_shipped_weights_stand_a_changed_contrast_better_than_squared_differences(
    repository: Path, cache: Path, tmp_path: Path
) -> None:
    quick = {"iterations": 150, "samples": 0, "uncertainty": False, "surface": False, "pictures": 0, "batch_size": 4}
    for name, options in (("learnt", {}), ("plain", {"learnt": False, "checkpoint": False, "weight": 0.2})):
        data = {"dataset_dir": cache, "pairs#data": "$@cohort.test[:4]", "output_dir": tmp_path / name}
        succeed(run(repository, "evaluate", **data, **quick, **options))
    errors = {name: mean(tmp_path / name, "epe") for name in ("learnt", "plain")}
    overlaps = {name: mean(tmp_path / name, "dice_mean") for name in ("learnt", "plain")}
    assert errors["learnt"] < 0.95 * errors["plain"]
    assert overlaps["learnt"] > overlaps["plain"] > mean(tmp_path / "plain", "dice_before_mean")
