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
"""Several metrics under their names, each fed with the tensors it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.metrics import CumulativeIterationMetric
from torch import Tensor

__all__ = ["MetricCollection"]


class MetricCollection:
    """Metrics by name, for the evaluator and for configs.

    Args:
        metrics: name to ``{"metric": metric, "inputs": [names of tensors]}``. ``inputs`` may also be a mapping from
            the metric's arguments to names. ``"required": False`` leaves the metric out of a batch that lacks an input.

    Raises:
        ValueError: when an entry lacks ``metric`` or ``inputs`` or has another key.

    Example:
        >>> from common.metrics import DiceScore
        >>> metrics = MetricCollection({"dice": {"metric": DiceScore([1]), "inputs": ["moved_label", "fixed_label"]}})
    """

    def __init__(self, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        for name, entry in metrics.items():
            if not {"metric", "inputs"} <= set(entry) <= {"metric", "inputs", "required"}:
                raise ValueError(
                    f"metric '{name}' needs the keys 'metric' and 'inputs' (and 'required'), got {list(entry)}"
                )
        self.entries = {name: dict(entry) for name, entry in metrics.items()}

    @property
    def metrics(self) -> dict[str, CumulativeIterationMetric]:
        """The metrics themselves, by name."""
        return {name: entry["metric"] for name, entry in self.entries.items()}

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """What the values of each metric are called, such as the labels; empty where a metric does not say."""
        return {name: tuple(getattr(metric, "columns", ())) for name, metric in self.metrics.items()}

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Measure one batch.

        Args:
            values: tensors by name.

        Returns:
            ``(B, K)`` values by metric.

        Raises:
            KeyError: when a tensor that a metric requires is not there; the message lists what is.
        """
        return {
            name: self._measure(name, entry, values)
            for name, entry in self.entries.items()
            if entry.get("required", True) or not _missing(entry["inputs"], values)
        }

    def _measure(self, name: str, entry: Mapping[str, Any], values: Mapping[str, Any]) -> Tensor:
        missing = _missing(entry["inputs"], values)
        if missing:
            raise KeyError(f"metric '{name}' needs {missing}; there are {sorted(values)}")
        inputs = entry["inputs"]
        if isinstance(inputs, Mapping):
            return entry["metric"](**{argument: values[key] for argument, key in inputs.items()})
        return entry["metric"](*[values[key] for key in inputs])

    def aggregate(self) -> dict[str, float]:
        """The mean of each metric over everything measured since the last reset, on all ranks."""
        return {name: float(metric.aggregate()) for name, metric in self.metrics.items()}

    def reset(self) -> None:
        """Forget what was measured."""
        for metric in self.metrics.values():
            metric.reset()


def _missing(inputs: Sequence[str] | Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    names = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [name for name in names if values.get(name) is None]
