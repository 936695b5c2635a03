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

from collections.abc import Mapping, Sequence
from typing import Any

from common.losses import LNCC
from common.metrics import (
    AverageSurfaceDistance,
    DiceScore,
    EndpointError,
    HausdorffDistance95,
    InverseConsistency,
    MetricCollection,
    NonDiffeomorphicVolumePercent,
    NonPositiveJacobianPercent,
    Reported,
    Similarity,
    StdLogJacobian,
    TargetRegistrationError,
)

__all__ = ["standard_measures"]

Entries = dict[str, dict[str, Any]]
_DEFINITIONS = ("standard", "learn2reg", "both")


def standard_measures(
    labels: Sequence[int] = (),
    spacing: Sequence[float] | str | None = None,
    surface: bool = False,
    true_field: bool = False,
    definition: str = "standard",
    inverse: bool = False,
    seconds: bool = False,
    reported: Mapping[str, str] | None = None,
    landmarks: bool = False,
    some_labels: bool = False,
    stages: bool = False,
) -> MetricCollection:
    """Similarity and regularity always; overlap where there are labels; each overlap also before registration.

    Args:
        labels: the labels that count; none for images only.
        spacing: mm per axis for surface distances, or the name of the value that has it for each pair, such as
            "fixed_spacing"; voxels count as 1 mm without it.
        surface: also HD95 and average surface distance (slower).
        true_field: also the end-point error, for pairs that carry ``true_ddf``.
        definition: ``"standard"``; ``"learn2reg"`` for the challenge's own Dice, HD95, NDV and SDlogJ; or ``"both"``,
            the latter beside the former with the suffix ``_l2r``.
        inverse: also how well the two fields of networks that give ``inverse_ddf`` undo each other.
        seconds: also how long the network took for each pair.
        reported: further columns by name, each with the network's output whose mean it holds, such as
            ``{"weight": "weight_map"}``; without a value where the network does not give that output.
        landmarks: also the mean distance of landmarks from their partners, in mm of the moving scan's world, for pairs
            that carry ``fixed_points`` and ``moving_points``.
        some_labels: pairs may lack label maps or landmarks; what is measured on them is then left out of their rows.
        stages: also overlap and distance of landmarks at more stages than before and after the network, for pairs that
            went through them: ``_initial``, as the files' headers place them, where an affine alignment came before
            the network; ``_network``, what the network alone reached, where its field was refined.

    Returns:
        the measures, named ``similarity`` (1 is best), ``dice``, ``hd95``, ``asd``, ``ndv``, ``folds``, ``sdlogj``,
        ``epe``, ``tre``, ``inverse_consistency``, ``inversion_iterations``, ``seconds``, with the suffix ``_before``
        for the value before registration: as the network met the pair.

    Raises:
        ValueError: for an unknown definition.
    """
    if definition not in _DEFINITIONS:
        raise ValueError(f"definition must be one of {_DEFINITIONS}, got {definition!r}")
    entries = _standard(labels, spacing, surface)
    if definition != "standard":
        entries |= _learn2reg(labels, surface, "_l2r" if definition == "both" else "")
    if landmarks:
        entries |= {"tre_before": _distance("fixed_points"), "tre": _distance("fixed_points", ddf="ddf")}
    if some_labels:
        for entry in entries.values():
            inputs = entry["inputs"].values() if isinstance(entry["inputs"], Mapping) else entry["inputs"]
            entry["required"] = not any("label" in name or "points" in name for name in inputs)
    if stages:
        entries |= _stages(labels, landmarks)
    if true_field:
        entries["epe"] = {"metric": EndpointError(), "inputs": ["ddf", "true_ddf"]}
    if inverse:
        fields, solver = ["ddf", "inverse_ddf"], ["inversion_iterations"]
        entries["inverse_consistency"] = {"metric": InverseConsistency(), "inputs": fields, "required": False}
        entries["inversion_iterations"] = {"metric": Reported(), "inputs": solver, "required": False}
    if seconds:
        entries["seconds"] = {"metric": Reported(), "inputs": ["seconds"]}
    for name, source in (reported or {}).items():
        entries[name] = {"metric": Reported(), "inputs": [source], "required": False}
    return MetricCollection(entries)


def _standard(labels: Sequence[int], spacing: Sequence[float] | str | None, surface: bool) -> Entries:
    entries: Entries = {}
    if labels:
        entries |= _before_and_after("dice", lambda: DiceScore(labels), "label")
        # A label that was there and is warped out of existence is missed, not absent: it scores 0.
        entries["dice"]["inputs"].append("moving_label")
    entries |= _before_and_after("similarity", lambda: Similarity(LNCC()), "")
    if labels and surface:
        known = None if isinstance(spacing, str) else spacing
        distances = _before_and_after("hd95", lambda: HausdorffDistance95(labels, known), "label")
        distances |= _before_and_after("asd", lambda: AverageSurfaceDistance(labels, known), "label")
        if isinstance(spacing, str):
            for entry in distances.values():
                moved, fixed = entry["inputs"]
                entry["inputs"] = {"moved_label": moved, "fixed_label": fixed, "spacing": spacing}
        entries |= distances
    entries["ndv"] = {"metric": NonDiffeomorphicVolumePercent(), "inputs": ["ddf"]}
    entries["folds"] = {"metric": NonPositiveJacobianPercent(), "inputs": ["ddf"]}
    entries["sdlogj"] = {"metric": StdLogJacobian(), "inputs": ["ddf"]}
    return entries


def _stages(labels: Sequence[int], landmarks: bool) -> Entries:
    """The stages that only some pairs go through."""
    entries: Entries = {}
    for stage in ("initial", "network"):
        if labels:
            # As after registration: a label that is nowhere near the fixed scan is missed, not absent.
            inputs = [f"{stage}_label", "fixed_label", "moving_label"]
            entries[f"dice_{stage}"] = {"metric": DiceScore(labels), "inputs": inputs, "required": False}
        if landmarks:
            entries[f"tre_{stage}"] = {**_distance(f"{stage}_points"), "required": False}
    return entries


def _distance(points: str, **more: str) -> dict[str, Any]:
    """The distance of points in voxels of the moving image, or moved there by a field, from where they belong."""
    inputs = {"points": points, "target": "moving_points", "affine": "moving_affine", **more}
    return {"metric": TargetRegistrationError(), "inputs": inputs}


def _learn2reg(labels: Sequence[int], surface: bool, suffix: str) -> Entries:
    """As the organisers' evaluation has it: nearest-voxel labels, and a lost label is infinitely far."""
    entries: Entries = {}
    after = ["moved_label_l2r", "fixed_label", "moving_label"]
    if labels:
        entries[f"dice{suffix}_before"] = {"metric": DiceScore(labels), "inputs": ["moving_label", "fixed_label"]}
        entries[f"dice{suffix}"] = {"metric": DiceScore(labels), "inputs": after}
    if labels and surface:
        for name, inputs in ((f"hd95{suffix}_before", ["moving_label", "fixed_label"]), (f"hd95{suffix}", after)):
            entries[name] = {"metric": HausdorffDistance95(labels, definition="learn2reg"), "inputs": inputs}
    volume = NonDiffeomorphicVolumePercent("learn2reg")
    entries[f"ndv{suffix}"] = {"metric": volume, "inputs": ["ddf", "moving"]}
    entries[f"sdlogj{suffix}"] = {"metric": StdLogJacobian("learn2reg"), "inputs": ["ddf"]}
    return entries


def _before_and_after(name: str, make: Any, kind: str) -> Entries:
    suffix = f"_{kind}" if kind else ""
    return {
        f"{name}_before": {"metric": make(), "inputs": [f"moving{suffix}", f"fixed{suffix}"]},
        name: {"metric": make(), "inputs": [f"moved{suffix}", f"fixed{suffix}"]},
    }
