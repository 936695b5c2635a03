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
"""Real scans, registered by the shipped weights, which have seen random images only."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from common.io import load_image
from tests.bundles.commands import rows, run_bundle, succeed
from tests.itk_oracle import by_itk, itk_transform
from tests.processes import run_python


def evaluate(repository: Path, output_dir: Path, dataset: str, folder: Path, **options: object) -> dict[str, float]:
    """Means over every tenth test pair."""
    if not folder.is_dir():
        pytest.skip(f"no scans at {folder}")
    split = json.loads((repository / f"data_splits/{dataset}.json").read_text())
    few = output_dir / "few.json"
    few.write_text(json.dumps({**split, "test": split["test"][::10]}))
    settings = {"dataset": dataset, "datalist": few, "dataset_dir": folder, "output_dir": output_dir, "pictures": 0}
    succeed(run_bundle("dual_stream_pyramid", repository, "evaluate", **{**settings, **options}))
    return {row["metric"]: float(row["mean"]) for row in rows(output_dir / "summary.csv")}


def test_hippocampi(repository: Path, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/Task04_Hippocampus"
    mean = evaluate(repository, tmp_path, "hippocampus", folder, spatial_size=[48, 64, 48], amp="bf16")
    assert mean["dice_mean"] > max(0.70, mean["dice_before_mean"] + 0.12)
    assert mean["hd95_mean"] < mean["hd95_before_mean"]
    assert mean["folds"] == 0 and mean["ndv"] < 0.001
    assert mean["inverse_consistency"] < 0.1


def test_slices_of_brains(repository: Path, shared: Path, tmp_path: Path) -> None:
    mean = evaluate(repository, tmp_path, "oasis2d", shared / "data/OASIS2D", spatial_size=[128, 128])
    assert mean["similarity"] > mean["similarity_before"] + 0.1
    assert mean["folds"] == 0


def test_two_scans_are_better_aligned_at_every_stage(repository: Path, shared: Path, tmp_path: Path) -> None:
    """The short command with the shipped weights; what another program makes of the transform that it writes."""
    folder = shared / "data/Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"no scans at {folder}")
    files = {role: folder / f"imagesTr/hippocampus_{n}.nii.gz" for role, n in (("moving", "311"), ("fixed", "053"))}
    files |= {f"{role}_label": folder / f"labelsTr/{path.name}" for role, path in files.items()}
    arguments = [text for role, path in files.items() for text in (f"--{role}", str(path))]
    command = ["-m", "common", "register", *arguments, "--output_dir", str(tmp_path), "--refine", "12"]
    text = succeed(run_python(command, repository))
    assert "affine alignment" in text and "refine 12/12" in text and "report.html" in text
    measures = json.loads((tmp_path / "metrics.json").read_text())
    stages = [sum(measures[name]) / 2 for name in ("dice_initial", "dice_before", "dice_network", "dice")]
    assert stages == sorted(stages) and stages[0] < 0.75 and stages[-1] > 0.84
    assert measures["folds"] == [0.0] and (tmp_path / "inverse_transform.h5").is_file()
    moving, fixed = (load_image(files[role]) for role in ("moving", "fixed"))
    theirs = by_itk(itk_transform(tmp_path / "transform.h5", 3), moving, fixed)
    ours = load_image(tmp_path / "moved.nii.gz").array
    # The first voxel beyond a scan's edge is ours to fade out and theirs to cut off.
    inside = theirs > 0
    assert inside.mean() > 0.8
    assert np.quantile(abs(theirs - ours)[inside], 0.9) < 0.1 < theirs[inside].std() / 100
