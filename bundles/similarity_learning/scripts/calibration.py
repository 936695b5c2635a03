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
"""Does the predicted uncertainty rank the errors, and has it their size? One statistic a pair, and curves over all.

Two cases. Of the *displacement*, where the true field is known: the standard deviation of a voxel's origin against its
end-point error. Of the *label*, where both scans have labels: the standard deviation of the propagated label against
whether the label that was propagated is wrong. Labels are judged where the fixed scan has one or some sample brings
one: far from all labels everything is certain and right, which would flatter any method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.metrics.overlap import label_codes
from common.spatial import warp_labels

from .uncertainty import displacement_std, label_probabilities, label_std, total_std

__all__ = [
    "Case",
    "area_above_oracle",
    "confidence_bins",
    "displacement_case",
    "expected_calibration_error",
    "label_case",
    "quantile_bins",
    "sparsification",
    "spearman",
]


@dataclass(frozen=True)
class Case:
    """What a method says and what is true, for a batch.

    Attributes:
        uncertainty: (B, 1, *S), not negative.
        error: (B, 1, *S), not negative.
        region: (B, 1, *S) bool, the voxels that count.
        probabilities: (B, L, *S) of the labels; None for displacements.
        codes: (B, 1, *S), the true label's place among the L, L for background; None for displacements.
    """

    uncertainty: Tensor
    error: Tensor
    region: Tensor
    probabilities: Tensor | None = None
    codes: Tensor | None = None

    def of(self, item: int) -> tuple[Tensor, Tensor]:
        """Uncertainty and error in the region of one item, (n,) each."""
        inside = self.region[item]
        return self.uncertainty[item][inside], self.error[item][inside]


def displacement_case(values: Mapping[str, Any]) -> Case | None:
    """Standard deviation of the displacement in voxels against the end-point error.

    Args:
        values: with ``ddf``, ``true_ddf`` and ``ddf_std`` or ``ddf_samples``; ``fixed_mask`` is where it counts, or
            everywhere.

    Returns:
        the case; None where one of these is missing.
    """
    true, std = values.get("true_ddf"), values.get("ddf_std")
    if std is None and values.get("ddf_samples") is not None:
        std = displacement_std(values["ddf_samples"])
    if true is None or std is None:
        return None
    error = (values["ddf"].float() - true.float()).norm(dim=1, keepdim=True)
    mask = values.get("fixed_mask")
    region = torch.ones_like(error, dtype=torch.bool) if mask is None else mask > 0
    return Case(total_std(std), error, region)


def label_case(values: Mapping[str, Any], labels: Sequence[int]) -> Case | None:
    """Standard deviation of the propagated label against whether the label of the mean field is wrong.

    Args:
        values: with ``ddf``, ``ddf_samples``, ``moving_label``, ``fixed_label``; ``moved_label`` if it is known.
        labels: those that count.

    Returns:
        the case; None where one of these is missing.
    """
    samples, moving, fixed = (values.get(name) for name in ("ddf_samples", "moving_label", "fixed_label"))
    if samples is None or moving is None or fixed is None or not labels:
        return None
    probabilities = label_probabilities(moving, samples, labels)
    moved = values.get("moved_label")
    moved = warp_labels(moving, values["ddf"]) if moved is None else moved
    codes = label_codes(fixed, labels)
    error = (label_codes(moved, labels) != codes).float()
    region = (codes < len(labels)) | (probabilities.sum(1, keepdim=True) > 0)
    return Case(label_std(probabilities), error, region, probabilities, codes)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two samples (n,); equal values share the mean of their ranks.

    Returns:
        a number in [-1, 1]; NaN for fewer than two values or where one of the two is constant.
    """
    if a.numel() < 2:
        return math.nan
    x, y = (_ranks(values) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else math.nan


def sparsification(uncertainty: Tensor, error: Tensor, fractions: Tensor) -> Tensor:
    """The share of the mean error that is left once the most uncertain voxels are taken out.

    Voxels of equal uncertainty go in any order, so each counts with the mean error of those that it is equal to. With
    ``error`` for ``uncertainty`` it is the curve of an oracle; 1 everywhere is that of chance.

    Args:
        uncertainty: (n,).
        error: (n,), not negative.
        fractions: of the voxels that are taken out, in [0, 1).

    Returns:
        as many numbers, float64; NaN where there is no error or no voxel.
    """
    if not error.numel() or not bool(error.any()):
        return torch.full(fractions.shape, math.nan, dtype=torch.float64)
    _, place, counts = torch.unique(uncertainty, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=error.device).index_add_(0, place, error.double())
    kept = torch.repeat_interleave(sums / counts, counts).cumsum(0)
    count = ((1 - fractions.double()) * len(kept)).round().long().clamp(1, len(kept)).to(kept.device)
    return (kept[count - 1] / count / error.double().mean()).cpu()


def area_above_oracle(curve: Tensor, oracle: Tensor, fractions: Tensor) -> float:
    """The area between a sparsification curve and the oracle's, by trapezia; 0 is a perfect ranking."""
    return float(torch.trapezoid(curve - oracle, fractions.double()))


def quantile_bins(uncertainty: Tensor, error: Tensor, count: int) -> Tensor:
    """Sums over the voxels of each of ``count`` equally full bins, from the most certain to the least.

    Returns:
        (count, 3) float64: squared uncertainties, squared errors, voxels. Root mean squares of the first two agree
        where the uncertainty has the size of the errors.
    """
    order = uncertainty.argsort(stable=True)
    place = (torch.arange(len(order), device=order.device) * count) // max(len(order), 1)
    return _binned(place, count, uncertainty[order].double().square(), error[order].double().square())


def confidence_bins(case: Case, item: int, count: int) -> Tensor:
    """Sums over the voxels of each of ``count`` bins of equal width of the most probable label's probability.

    Returns:
        (count, 3) float64: probabilities, how often that label is the true one, voxels.
    """
    assert case.probabilities is not None and case.codes is not None
    inside = case.region[item, 0]
    shares = case.probabilities[item][:, inside]
    shares = torch.cat([shares, 1 - shares.sum(0, keepdim=True)])
    confidence, best = shares.max(0)
    right = best == case.codes[item, 0][inside]
    place = (confidence * count).long().clamp(0, count - 1)
    return _binned(place, count, confidence.double(), right.double())


def expected_calibration_error(bins: Tensor) -> float:
    """The mean distance of probability and frequency over :func:`confidence_bins`; NaN of no voxels.

    Source: Guo et al., On calibration of modern neural networks (ICML 2017).
    """
    total = float(bins[:, 2].sum())
    return float((bins[:, 0] - bins[:, 1]).abs().sum()) / total if total else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64; equal values have the mean of theirs."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


def _binned(place: Tensor, count: int, *values: Tensor) -> Tensor:
    columns = torch.stack([*values, torch.ones_like(values[0])], dim=1)
    return (
        torch.zeros(count, columns.shape[1], dtype=torch.float64, device=place.device)
        .index_add_(0, place, columns)
        .cpu()
    )
