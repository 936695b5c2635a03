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
"""Real scans, registered by gradient descent alone and after a few steps of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles.commands import rows, run_bundle, succeed


def run(repository: Path, name: str, output_dir: Path, **overrides: object) -> dict[str, float]:
    succeed(run_bundle("gradirn", repository, name, output_dir=output_dir, **overrides))
    return {row["metric"]: float(row["mean"]) for row in rows(output_dir / "summary.csv")}


@pytest.fixture(scope="module")
def slices(shared: Path) -> Path:
    folder = shared / "data/OASIS2D"
    if not folder.is_dir():
        pytest.skip(f"no brain slices at {folder}")
    return folder


def test_gradient_descent_brings_real_slices_together(repository: Path, slices: Path, tmp_path: Path) -> None:
    options = {"dataset": "oasis2d", "dataset_dir": slices, "spatial_size": [128, 128], "pictures": 0}
    mean = run(repository, "evaluate", tmp_path, checkpoint=False, **options)
    assert mean["rmse"] < 0.9 * mean["rmse_before"]
    assert mean["similarity"] > mean["similarity_before"]
    assert mean["folds"] < 1


def test_a_few_steps_of_training_add_to_it(repository: Path, slices: Path, tmp_path: Path) -> None:
    data = {"dataset": "oasis2d", "dataset_dir": slices, "spatial_size": [128, 128]}
    plain = run(repository, "evaluate", tmp_path / "plain", split="validation", checkpoint=False, pictures=0, **data)
    options = {"max_epochs": 1, "epoch_length": 20, "batch_size": 2, "val_interval": 1, "train_count": 10}
    trained = run(repository, "train", tmp_path / "trained", **data, **options)
    assert trained["rmse_before"] == pytest.approx(plain["rmse_before"])
    assert trained["rmse"] < 0.97 * plain["rmse"]
