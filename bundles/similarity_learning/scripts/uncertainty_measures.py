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
"""Columns of evaluation that say how uncertain a registration is, and whether rightly so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.engines import standard_measures
from common.metrics import MetricCollection, RegistrationMetric
from common.metrics.base import nan_mean
from common.metrics.overlap import label_codes

from .calibration import (
    Case,
    confidence_bins,
    displacement_case,
    expected_calibration_error,
    label_case,
    spearman,
)
from .uncertainty import label_entropy, total_std

__all__ = ["UncertaintyMeasures", "uncertainty_measures"]

_BINS = 10


def uncertainty_measures(labels: Sequence[int] = (), uncertainty: bool = True, **options: Any) -> UncertaintyMeasures:
    """The standard measures, and those of uncertainty where a network gives samples of its field.

    - ``uncertainty``, ``uncertainty_mm``: the mean standard deviation of the displacement, in voxels and in mm, inside
      the fixed labels, or else inside the fixed mask, or else everywhere.
    - ``rank_epe``: the rank correlation of that standard deviation with the end-point error, where the true field is
      known; ``error_over_std`` the root mean square of the errors over that of the standard deviations, above 1 where a
      network is too sure of itself.
    - ``label_std``, for each label: the mean standard deviation of its propagated indicator, over the voxels that some
      sample brings it to; ``label_entropy``: the mean entropy of the propagated label in nats.
    - ``rank_label``: the rank correlation of the standard deviation of the propagated label with its being wrong;
      ``label_ece``: the expected calibration error of its probability.

    Args:
        labels: the labels that count; none for images only.
        uncertainty: whether to measure it at all; it takes time with many samples.
        options: of :func:`common.engines.standard_measures`.

    Returns:
        the measures by name.
    """
    return UncertaintyMeasures(standard_measures(labels, **options).entries, labels, uncertainty)


class UncertaintyMeasures(MetricCollection):
    """Measures of a batch and of what its samples say.

    Args:
        metrics: those of the registration itself, as for :class:`common.metrics.MetricCollection`.
        labels: the labels that count.
        uncertainty: whether to measure uncertainty too.
    """

    def __init__(
        self, metrics: Mapping[str, Mapping[str, Any]], labels: Sequence[int] = (), uncertainty: bool = True
    ) -> None:
        super().__init__({**metrics, **(_entries(labels) if uncertainty else {})})
        self.labels = tuple(labels)
        self.uncertainty = uncertainty

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Measure one batch; see :class:`common.metrics.MetricCollection`."""
        return super().__call__(_Derived(values, self._cases(values)))

    def _cases(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What several measures need, computed once."""
        if not self.uncertainty or values.get("ddf_std") is None:
            return {}
        region = _region(values, self.labels)
        # Samples move label maps once for all measures.
        cases = {"displacement_case": displacement_case(values), "label_case": label_case(values, self.labels)}
        return {"uncertainty_region": region, **{name: case for name, case in cases.items() if case is not None}}


class _Derived(Mapping[str, Any]):
    """Values of a batch, and more."""

    def __init__(self, values: Mapping[str, Any], more: Mapping[str, Any]) -> None:
        self._values, self._more = values, more

    def __getitem__(self, name: str) -> Any:
        return self._more[name] if name in self._more else self._values[name]

    def __iter__(self) -> Any:
        return iter([*self._values, *self._more])

    def __len__(self) -> int:
        return len(self._values) + len(self._more)


def _entries(labels: Sequence[int]) -> dict[str, dict[str, Any]]:
    std, region = "ddf_std", "uncertainty_region"
    inputs: dict[str, tuple[RegistrationMetric, Any]] = {
        "uncertainty": (_MeanStd(), {"ddf_std": std, "region": region}),
        "uncertainty_mm": (_MeanStd(), {"ddf_std": std, "region": region, "spacing": "fixed_spacing"}),
        "rank_epe": (_Rank(), ["displacement_case"]),
        "error_over_std": (_ErrorOverStd(), ["displacement_case"]),
    }
    if labels:
        inputs |= {
            "label_std": (_LabelStd(labels), ["label_case"]),
            "label_entropy": (_LabelEntropy(), ["label_case"]),
            "rank_label": (_Rank(), ["label_case"]),
            "label_ece": (_CalibrationError(), ["label_case"]),
        }
    return {name: {"metric": metric, "inputs": names, "required": False} for name, (metric, names) in inputs.items()}


def _region(values: Mapping[str, Any], labels: Sequence[int]) -> Tensor:
    fixed, mask = values.get("fixed_label"), values.get("fixed_mask")
    if fixed is not None and labels:
        return label_codes(fixed, labels) < len(labels)
    like = values["ddf_std"][:, :1]
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask > 0


class _MeanStd(RegistrationMetric):
    """The mean over a region of the standard deviation of the displacement."""

    def _compute_tensor(self, ddf_std: Tensor, region: Tensor, spacing: Tensor | None = None) -> Tensor:  # type: ignore[override]
        total = total_std(ddf_std, spacing)
        return nan_mean(total.masked_fill(~region, float("nan")).flatten(1), 1)[:, None]


class _OfCase(RegistrationMetric):
    """Numbers for each item of a case."""

    def _compute_tensor(self, case: Case) -> Tensor:  # type: ignore[override]
        rows = [self._measure(case, item) for item in range(len(case.error))]
        return torch.tensor(rows, dtype=torch.float32, device=case.error.device).reshape(len(rows), -1)

    def _measure(self, case: Case, item: int) -> float | list[float]:
        raise NotImplementedError


class _Rank(_OfCase):
    """Rank correlation of uncertainty and error."""

    def _measure(self, case: Case, item: int) -> float:
        return spearman(*case.of(item))


class _ErrorOverStd(_OfCase):
    """Root mean square of the errors over that of the standard deviations."""

    def _measure(self, case: Case, item: int) -> float:
        std, error = case.of(item)
        return float((error.square().mean() / std.square().mean()).sqrt())


class _LabelStd(_OfCase):
    """Mean standard deviation of each label's indicator, where some sample has it."""

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__()
        self.columns = tuple(str(label) for label in labels)

    def _measure(self, case: Case, item: int) -> list[float]:
        assert case.probabilities is not None
        shares = [share[share > 0] for share in case.probabilities[item]]
        return [float((share * (1 - share)).clamp_min(0).sqrt().mean()) for share in shares]


class _LabelEntropy(_OfCase):
    """Mean entropy of the propagated label."""

    def _measure(self, case: Case, item: int) -> float:
        assert case.probabilities is not None
        entropy = label_entropy(case.probabilities[item : item + 1])
        return float(entropy[0][case.region[item]].mean())


class _CalibrationError(_OfCase):
    """Expected calibration error of the propagated label's probability."""

    def _measure(self, case: Case, item: int) -> float:
        return expected_calibration_error(confidence_bins(case, item, _BINS))
