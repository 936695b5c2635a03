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
"""Real scans: hippocampi registered to one that serves as atlas, by the plain similarity and by one just begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bundles.commands import rows, run_bundle, succeed

SIZE = [40, 56, 40]


def run(repository: Path, name: str, output_dir: Path, **overrides: Any) -> dict[str, float]:
    succeed(run_bundle("similarity_learning", repository, name, output_dir=output_dir, **overrides))
    return {row["metric"]: float(row["mean"]) for row in rows(output_dir / "summary.csv")}


@pytest.fixture(scope="module")
def few(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An atlas, two subjects to train with, one to validate and two to test."""
    folder = shared / "data/Task04_Hippocampus"
    names = sorted(path.name for path in folder.glob("imagesTr/hippocampus_*.nii.gz"))
    if len(names) < 6:
        pytest.skip(f"no hippocampi at {folder}")

    def subject(name: str) -> dict[str, str]:
        return {"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"}

    atlas, others = subject(names[0]), [subject(name) for name in names[3:6]]
    pairs = [
        {"moving": s["image"], "moving_label": s["label"], "fixed": atlas["image"], "fixed_label": atlas["label"]}
        for s in others
    ]
    content = {
        "name": "few hippocampi",
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        "training": [subject(name) for name in names[1:3]],
        "atlas": atlas,
        "validation": pairs[:1],
        "test": pairs[1:],
    }
    path = tmp_path_factory.mktemp("list") / "dataset.json"
    path.write_text(json.dumps(content))
    return {"datalist": path, "dataset_dir": folder, "spatial_size": SIZE, "steps": 5}


@pytest.mark.parametrize("similarity", ["ssd", "lcc"])
def test_the_plain_similarity_registers_hippocampi_to_one_of_them(
    repository: Path, few: dict[str, Any], similarity: str, tmp_path: Path
) -> None:
    options = {"learnt": False, "checkpoint": False, "similarity": similarity, "iterations": 75, "samples": 2}
    options |= {"inner_learning_rate": 0.05, "weight": 0.3, "pictures": 0}
    mean = run(repository, "evaluate", tmp_path, **few, **options)
    assert mean["dice_mean"] > mean["dice_before_mean"] + 0.05
    assert mean["asd_mean"] < mean["asd_before_mean"]
    assert mean["folds"] < 0.5 and mean["uncertainty"] > 0


def test_a_similarity_learns_from_volumes_and_registers(repository: Path, few: dict[str, Any], tmp_path: Path) -> None:
    options = {"iterations": 6, "first_iterations": 20, "val_iterations": 20, "max_epochs": 2, "batch_size": 2}
    mean = run(repository, "train", tmp_path, **few, **options, val_interval=2, samples=0, uncertainty=False)
    assert mean["dice_mean"] > mean["dice_before_mean"]
