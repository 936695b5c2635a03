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
"""The measures that every bundle reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.losses import LNCC
from common.metrics import (
    AverageSurfaceDistance,
    DiceScore,
    EndpointError,
    HausdorffDistance95,
    MetricCollection,
    NonDiffeomorphicVolumePercent,
    NonPositiveJacobianPercent,
    Similarity,
    StdLogJacobian,
)

__all__ = ["standard_measures"]


def standard_measures(
    labels: Sequence[int] = (),
    spacing: Sequence[float] | str | None = None,
    surface: bool = False,
    true_field: bool = False,
    definition: str = "standard",
) -> MetricCollection:
    """Similarity and regularity always; overlap where there are labels; each overlap also before registration.

    Args:
        labels: foreground labels; none for images only.
        spacing: mm per axis for surface distances, or the name of the value that has it for each pair, such as
            "fixed_spacing"; voxels count as 1 mm without it.
        surface: also HD95 and average surface distance (slower).
        true_field: also the end-point error, for pairs that carry ``true_ddf``.
        definition: ``"standard"``, or ``"learn2reg"`` for the challenge's own.

    Returns:
        the measures, named ``similarity`` (1 is best), ``dice``, ``hd95``, ``asd``, ``ndv``, ``folds``, ``sdlogj``,
        ``epe``, with the suffix ``_before`` for the value before registration.
    """
    entries: dict[str, dict[str, Any]] = {}
    if labels:
        entries |= _before_and_after("dice", lambda: DiceScore(labels), "label")
        # A label that was there and is warped out of existence is missed, not absent: it scores 0.
        entries["dice"]["inputs"].append("moving_label")
    entries |= _before_and_after("similarity", lambda: Similarity(LNCC()), "")
    if labels and surface:
        known = None if isinstance(spacing, str) else spacing
        distances = _before_and_after("hd95", lambda: HausdorffDistance95(labels, known, definition), "label")
        distances |= _before_and_after("asd", lambda: AverageSurfaceDistance(labels, known), "label")
        if isinstance(spacing, str):
            for entry in distances.values():
                moved, fixed = entry["inputs"]
                entry["inputs"] = {"moved_label": moved, "fixed_label": fixed, "spacing": spacing}
        entries |= distances
    ndv_inputs = ["ddf", "moving"] if definition == "learn2reg" else ["ddf"]
    entries["ndv"] = {"metric": NonDiffeomorphicVolumePercent(definition), "inputs": ndv_inputs}
    entries["folds"] = {"metric": NonPositiveJacobianPercent(), "inputs": ["ddf"]}
    entries["sdlogj"] = {"metric": StdLogJacobian(definition), "inputs": ["ddf"]}
    if true_field:
        entries["epe"] = {"metric": EndpointError(), "inputs": ["ddf", "true_ddf"]}
    return MetricCollection(entries)


def _before_and_after(name: str, make: Any, kind: str) -> dict[str, dict[str, Any]]:
    suffix = f"_{kind}" if kind else ""
    return {
        f"{name}_before": {"metric": make(), "inputs": [f"moving{suffix}", f"fixed{suffix}"]},
        name: {"metric": make(), "inputs": [f"moved{suffix}", f"fixed{suffix}"]},
    }
