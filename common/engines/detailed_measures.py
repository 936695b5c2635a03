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
"""All that studies of hearts report beside the standard measures, on images, volumes and stacks of slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.engines.measures import standard_measures
from common.metrics import (
    DiceScore,
    HausdorffDistance,
    MeanJacobian,
    MetricCollection,
    PerSlice,
    RegistrationMetric,
    RootMeanSquareError,
    TargetRegistrationError,
)

__all__ = ["detailed_measures"]

# Intensities of a stack are those of all its slices together, as overlap is and the distance of its points; a number
# that a network reports is its own.
_WHOLE = ("rmse", "seconds")


def detailed_measures(
    labels: Sequence[int] = (),
    spacing: Sequence[float] | str | None = None,
    surface: bool = False,
    stacks: bool = False,
    **options: Any,
) -> MetricCollection:
    """The standard measures, and ``hd`` (largest surface distance), ``rmse`` of the images and ``mean_jacobian``.

    Args:
        labels: the labels that count; none for images only.
        spacing: mm per axis, or the name of the value that has it for each pair, such as "fixed_spacing".
        surface: also surface distances (slower).
        stacks: images are stacks (X, Y, Z) that a 2-D network registered slice by slice: distances, similarity and
            regularity are those of slices, averaged over the slices in which they exist; Dice, RMSE and landmarks are
            those of the whole stack.
        options: more of :func:`common.engines.standard_measures`.

    Returns:
        the measures by name, with the suffix ``_before`` for the value before registration.
    """
    entries = dict(standard_measures(labels, spacing, surface, **options).entries)
    if labels and surface:
        known = None if isinstance(spacing, str) else spacing
        for suffix in ("_before", ""):
            entries[f"hd{suffix}"] = {**entries[f"hd95{suffix}"], "metric": HausdorffDistance(labels, known)}
    for suffix, source in (("_before", "moving"), ("", "moved")):
        entries[f"rmse{suffix}"] = {"metric": RootMeanSquareError(), "inputs": [source, "fixed"]}
    entries["mean_jacobian"] = {"metric": MeanJacobian(), "inputs": ["ddf"]}
    if stacks:
        entries = {name: _by_slice(name, entry) for name, entry in entries.items()}
    return MetricCollection(entries)


def _by_slice(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    metric: RegistrationMetric = entry["metric"]
    if name.removesuffix("_before") in _WHOLE or isinstance(metric, (DiceScore, TargetRegistrationError)):
        return entry
    return {**entry, "metric": PerSlice(metric, field="ddf" in entry["inputs"])}
