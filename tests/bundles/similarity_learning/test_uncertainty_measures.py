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
"""Columns of uncertainty beside those of the registration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts.calibration_report import CalibrationReport
from bundles.similarity_learning.scripts.uncertainty_measures import uncertainty_measures
from common.engines import RegistrationEvaluator, standard_measures
from common.handlers import MetricsTable, PictureSaver
from common.networks import RegistrationNetwork

NAMES = {"uncertainty", "uncertainty_mm", "label_std", "label_entropy", "rank_label", "label_ece"}
TRUTHS = {"rank_epe", "error_over_std"}


class Spread(RegistrationNetwork):
    """No displacement; samples are moved along the first axis by 0, 1, 2, ... voxels at most, further down more so."""

    def __init__(self, spatial_dims: int, samples: int = 4) -> None:
        super().__init__(spatial_dims)
        self.samples = samples

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        size = image.shape[2:]
        ddf = image.new_zeros(len(image), self.spatial_dims, *size)
        if not self.samples:
            return {"ddf": ddf}
        height = torch.zeros_like(ddf)
        height[:, 0] = torch.linspace(0, 1, size[0]).view(-1, *[1] * (len(size) - 1))
        steps = [sign * (k + 1) for k in range(self.samples // 2) for sign in (1, -1)]
        samples = torch.stack([ddf + step * height for step in steps], dim=1)
        std = samples.std(1, correction=0)
        return {"ddf": ddf, "ddf_samples": samples, "ddf_std": std, "uncertainty": std.norm(dim=1, keepdim=True)}


def pairs(dims: int, count: int = 3, **more: Any) -> list[dict[str, Any]]:
    size = (12, 10, 8)[:dims]
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(count):
        label = torch.zeros(1, 1, *size, dtype=torch.int32)
        label[:, :, 3:9, 3 : 6 + k] = 1
        label[:, :, 7:9, 4:6] = 5
        image = torch.rand(1, 1, *size, generator=generator)
        affine = torch.diag(torch.tensor([0.5, 2.0, 2.0][:dims] + [1.0], dtype=torch.float64))[None]
        found.append(
            {
                "moving": image,
                "fixed": image.flip(2),
                "moving_label": label,
                "fixed_label": label.roll(1, 2),
                "moving_id": [f"m{k}"],
                "fixed_id": ["atlas"],
                "moving_affine": affine,
                "fixed_affine": affine,
                **more,
            }
        )
    return found


def evaluate(network: torch.nn.Module, data: list[dict[str, Any]], folder: Path, labels: list[int]) -> Any:
    """The evaluator, with the table and the report beside it."""
    true_field = "true_ddf" in data[0]
    metrics = uncertainty_measures(labels, true_field=true_field)
    handlers = [
        MetricsTable(folder, columns=metrics.columns),
        CalibrationReport(folder, labels),
        PictureSaver(folder, count=1),
    ]
    evaluator = RegistrationEvaluator("cpu", data, network, metrics, val_handlers=handlers, labels=labels)
    evaluator.run()
    return evaluator


class Fields(torch.nn.Module):
    """What the engine calls."""

    def __init__(self, network: RegistrationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.network.fields(image)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_evaluation_has_columns_a_table_and_a_picture(dims: int, tmp_path: Path) -> None:
    true = torch.zeros(1, dims, *(12, 10, 8)[:dims])
    true[:, 0] = 2 * torch.linspace(0, 1, 12).view(-1, *[1] * (dims - 1))
    evaluator = evaluate(Fields(Spread(dims)), pairs(dims, true_ddf=true), tmp_path, [1, 5])
    found = evaluator.state.metrics
    assert set(found) - set(standard_measures([1, 5], true_field=True).entries) == NAMES | TRUTHS
    # Errors grow with the standard deviation: 2 h against h * sqrt((1 + 4) / 2).
    assert found["rank_epe"] == pytest.approx(1) and found["error_over_std"] == pytest.approx(2 / math.sqrt(2.5))
    assert found["uncertainty_mm"] == pytest.approx(0.5 * found["uncertainty"])
    assert 0 < found["label_std"] < 0.5 and found["rank_label"] > 0 and 0 < found["label_ece"] < 1
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"label_std_1", "label_std_5", "label_entropy", "rank_epe"} <= set(head)
    lines = (tmp_path / "calibration.csv").read_text().splitlines()
    assert lines[0] == "kind,curve,x,y,count"
    assert {tuple(line.split(",")[:2]) for line in lines[1:]} == {
        (kind, curve)
        for kind in ("displacement", "label")
        for curve in ("spearman", "area_above_oracle", "sparsification", "oracle", "reliability")
    }
    assert (tmp_path / "calibration.png").stat().st_size > 10_000


def test_the_region_is_labels_then_mask_then_everything() -> None:
    network, data = Spread(2), pairs(2, 1)[0]
    mask = torch.zeros(1, 1, 12, 10, dtype=torch.int32)
    mask[:, :, 11:] = 1
    fields = network.fields(torch.cat([data["moving"], data["fixed"]], 1))
    values = {**data, **fields, "fixed_spacing": torch.tensor([[0.5, 2.0]]), "moved": data["moving"]}
    values["moved_label"] = values["moving_label"]
    spread = math.sqrt(2.5)
    height = torch.linspace(0, 1, 12)
    inside = (data["fixed_label"][0, 0] > 0).float()
    expected = float((inside * height[:, None]).sum() / inside.sum()) * spread
    assert float(uncertainty_measures([1, 5])(values)["uncertainty"]) == pytest.approx(expected)
    images = {k: v for k, v in values.items() if not k.endswith("label")}
    assert float(uncertainty_measures()({**images, "fixed_mask": mask})["uncertainty"]) == pytest.approx(spread)
    everywhere = uncertainty_measures()(images)
    assert float(everywhere["uncertainty"]) == pytest.approx(spread / 2)
    assert "label_std" not in everywhere and "rank_epe" not in everywhere


def test_a_network_without_samples_has_the_standard_measures_alone(tmp_path: Path) -> None:
    evaluator = evaluate(Fields(Spread(2, samples=0)), pairs(2), tmp_path, [1, 5])
    assert {k for k, v in evaluator.state.metrics.items() if math.isnan(v)} == NAMES | TRUTHS
    assert "label_std_1" not in (tmp_path / "metrics.csv").read_text()
    assert not (tmp_path / "calibration.csv").exists()


def test_it_can_be_switched_off() -> None:
    assert set(uncertainty_measures([1], uncertainty=False).entries) == set(standard_measures([1]).entries)
    with pytest.raises(TypeError, match="surfaces"):
        uncertainty_measures([1], surfaces=True)
