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
"""Real subjects that nothing was trained on, registered by the weights the bundle ships."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.bundles.commands import run_bundle, succeed


def run(repository: Path, name: str, **overrides: object) -> str:
    return succeed(run_bundle("ssl_pretrain", repository, name, **overrides))


@pytest.fixture(scope="module")
def hippocampus(shared: Path) -> Path:
    folder = shared / "data/Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"no hippocampus data at {folder}")
    return folder


def test_shipped_weights_register_unseen_hippocampi(repository: Path, hippocampus: Path, tmp_path: Path) -> None:
    split = json.loads((repository / "data_splits/hippocampus.json").read_text())
    few = {**split, "test": split["test"][::8]}
    (tmp_path / "few.json").write_text(json.dumps(few))
    run(
        repository,
        "evaluate",
        dataset="hippocampus",
        datalist=tmp_path / "few.json",
        dataset_dir=hippocampus,
        spatial_size=[64, 64, 64],
        output_dir=tmp_path,
        pictures=0,
    )
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    mean = {
        key: sum(float(row[key]) for row in rows) / len(rows)
        for key in ("dice_mean", "dice_before_mean", "ndv", "hd95_mean", "hd95_before_mean")
    }
    assert len(rows) == len(few["test"]) >= 7
    assert mean["dice_mean"] > mean["dice_before_mean"] + 0.12
    assert mean["dice_mean"] > 0.70
    assert mean["hd95_mean"] < mean["hd95_before_mean"]
    assert mean["ndv"] < 0.01


def test_a_few_steps_on_real_subjects_improve_unseen_ones(repository: Path, hippocampus: Path, tmp_path: Path) -> None:
    text = run(
        repository,
        "finetune",
        dataset="hippocampus",
        dataset_dir=hippocampus,
        train_count=8,
        spatial_size=[48, 48, 48],
        max_epochs=1,
        epoch_length=25,
        val_interval=1,
        output_dir=tmp_path,
    )
    with open(tmp_path / "summary.csv") as file:
        mean = {row["metric"]: float(row["mean"]) for row in csv.DictReader(file)}
    assert mean["similarity"] > mean["similarity_before"] + 0.03, text[-2000:]
