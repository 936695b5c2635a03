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
from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from common.engines import PairsEvaluator, standard_measures

logging.getLogger("ignite").setLevel(logging.CRITICAL)
NAMES = {"moving_id": ["m"], "fixed_id": ["f"], "id": ["x"]}


class Zero(nn.Module):
    """No motion, but only for images that it likes."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        if image.shape[-1] < 6:
            raise RuntimeError("too small")
        return {"ddf": image.new_zeros(len(image), 2, *image.shape[2:])}


def batch(size: int, label: bool = False) -> dict[str, Any]:
    image = torch.rand(1, 1, 8, size, generator=torch.Generator().manual_seed(size))
    labels = {f"{role}_label": (image > 0.5).int() for role in ("moving", "fixed")} if label else {}
    grids = {f"{role}_affine": torch.eye(3, dtype=torch.float64)[None] for role in ("moving", "fixed")}
    return {**NAMES, "moving": image, "fixed": image, **labels, **grids}


def outputs(batches: list[dict[str, Any]], **options: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    metrics = standard_measures(labels=[1], some_labels=True)
    evaluator = PairsEvaluator("cpu", batches, Zero(), metrics=metrics, **options)
    seen: list[dict[str, Any]] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(evaluator.state.output))  # type: ignore[arg-type]
    evaluator.run()
    return seen, evaluator.state.metrics


def test_a_list_goes_on_after_a_pair_that_fails() -> None:
    bad = {**NAMES, "error": ["no image"]}
    seen, means = outputs([batch(7, label=True), bad, batch(5), NAMES, batch(9)], keep_going=True)
    assert [output.get("error") for output in seen] == [None, ["no image"], ["too small"], None, None]
    assert [set(output["metrics"]) for output in seen[1:4]] == [set(), set(), set()]
    # Overlap is left out where there are no labels.
    assert float(seen[0]["metrics"]["dice"]) == 1 == means["dice"]
    assert "dice" not in seen[4]["metrics"] and float(seen[4]["metrics"]["similarity"]) > 0.9
    assert all(output["id"] == ["x"] for output in seen)


def test_one_pair_alone_raises() -> None:
    with pytest.raises(RuntimeError, match="too small"):
        outputs([batch(5)])


def test_nothing_but_failures_has_no_means() -> None:
    _, means = outputs([batch(5)], keep_going=True)
    assert means["dice"] != means["dice"] and means["similarity"] != means["similarity"]


class Shift(nn.Module):
    """One voxel along the first axis."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        ddf = image.new_zeros(len(image), 2, *image.shape[2:])
        ddf[:, 0] = 1.0
        return {"ddf": ddf}


def test_what_the_network_alone_reached_is_measured_beside_the_refined_field() -> None:
    axis = torch.linspace(-1, 1, 24)
    smooth = torch.exp(-4 * (axis[:, None] ** 2 + axis[None] ** 2))[None, None]
    pair = {**batch(24, label=False), "moving": smooth.roll(3, 2), "fixed": smooth}
    pair |= {"moving_label": (pair["moving"] > 0.6).int(), "fixed_label": (smooth > 0.6).int()}
    pair |= {"fixed_points": torch.tensor([[[11.0, 11.0]]]), "moving_points": torch.tensor([[[14.0, 11.0]]])}
    found = []
    for refine in (0, 30):
        metrics = standard_measures([1], landmarks=True, some_labels=True, stages=True)
        evaluator = PairsEvaluator("cpu", [pair], Shift(), metrics=metrics, refine=refine)
        evaluator.run()
        found.append({name: float(value) for name, value in evaluator.state.output["metrics"].items()})
    alone, refined = found
    assert "dice_network" not in alone and "tre_network" not in alone
    assert refined["tre_network"] == alone["tre"] == 2.0 and refined["tre_before"] == 3.0
    assert refined["dice_network"] == alone["dice"] < refined["dice"]
    assert refined["tre"] < 1.0
