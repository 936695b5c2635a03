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
"""One row per registered pair in a CSV file, and a summary."""

from __future__ import annotations

import csv
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor

from common.handlers.output import claim_folder, engine_output, gather_objects, is_first_rank, replacing

__all__ = ["MetricsTable"]

logger = logging.getLogger(__name__)

Row = dict[str, Any]
_IDS = ("moving_id", "fixed_id")
# Columns that are no numbers; "error" is the last one.
_TEXTS = (*_IDS, "id", "error")


class MetricsTable:
    """Write every pair's metrics, and over all pairs mean, standard deviation, median and range of each column.

    The columns of a metric with K values are ``dice_1`` ... ``dice_K`` (named by label where labels are known) and
    ``dice_mean``; of one with a single value just its name. A metric ``x_before`` is the one of the unregistered pair
    and is shown before the arrow in the line that is logged: ``dice 0.601 -> 0.752, hd95 2.31, ndv 0.002``.
    What could not be measured is ``nan`` in the table and left out of the summary, whose columns ``count`` and ``nan``
    say how many pairs a mean is of and how many it leaves out.

    Attach it on every rank: rows are gathered in the order of the data, pairs that a sampler repeated to fill up ranks
    are dropped, and the first rank writes. Each run of the evaluator replaces the files.

    Args:
        output_dir: folder, made and tried when the evaluator starts.
        filename: the rows.
        summary_filename: the summary; None writes none.
        labels: what the K values stand for: label values in order, or a mapping from label values to names.
        columns: the same per metric, ``{"dice": ["1", "2"]}``, such as ``MetricCollection.columns``; beats ``labels``.

    Example:
        ``MetricsTable("output", labels=[1, 2]).attach(evaluator)``
    """

    def __init__(
        self,
        output_dir: str | Path,
        filename: str = "metrics.csv",
        summary_filename: str | None = "summary.csv",
        labels: Sequence[int | str] | Mapping[Any, str] | None = None,
        columns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.filename, self.summary_filename = filename, summary_filename
        names = labels.values() if isinstance(labels, Mapping) else labels or ()
        self.labels = tuple(str(name) for name in names)
        self.columns = {name: tuple(values) for name, values in (columns or {}).items()}
        self.rows: list[Row] = []
        self.summary: dict[str, dict[str, float]] = {}
        self._local: list[Row] = []
        self._headlines: dict[str, str] = {}

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._local.clear()
        if is_first_rank():
            claim_folder(self.output_dir)

    def _collect(self, engine: Engine) -> None:
        output = engine_output(engine)
        metrics: dict[str, Tensor] = {name: torch.as_tensor(v).detach() for name, v in output["metrics"].items()}
        values = {name: value.reshape(len(value), -1).double().cpu() for name, value in metrics.items()}
        count = max((len(value) for value in values.values()), default=0)
        for item in range(count):
            row: Row = {key: str(output[key][item]) if output.get(key) is not None else "" for key in _IDS}
            for name, value in values.items():
                row.update(self._named(name, value[item].tolist()))
            self._local.append(row)

    def _named(self, name: str, values: Sequence[float], columns: Mapping[str, Sequence[str]] | None = None) -> Row:
        self._headlines[name] = name if len(values) == 1 else f"{name}_mean"
        if len(values) == 1:
            return {name: values[0]}
        given = (self.columns if columns is None else columns).get(name, self.labels)
        names = given if len(given) == len(values) else tuple(str(k) for k in range(1, len(values) + 1))
        present = [value for value in values if not math.isnan(value)]
        mean = sum(present) / len(present) if present else math.nan
        named = {f"{name}_{column}": value for column, value in zip(names, values, strict=True)}
        return {**named, f"{name}_mean": mean}

    def _finish(self, engine: Engine) -> None:
        ranks = gather_objects((self._local, self._headlines))
        self.rows = _merge([rows for rows, _ in ranks])
        self._headlines = {name: column for _, headlines in ranks for name, column in headlines.items()}
        if not is_first_rank() or not self.rows:
            return
        self.summary = _summarise(self.rows)
        columns = sorted(dict.fromkeys(key for row in self.rows for key in row), key="error".__eq__)
        _write(self.output_dir / self.filename, columns, self.rows)
        if self.summary_filename:
            lines = [{"metric": name, **values} for name, values in self.summary.items()]
            _write(self.output_dir / self.summary_filename, ["metric", *_STATISTICS, "nan"], lines)
        logger.info("%d pairs: %s", len(self.rows), self.line())

    def line(self) -> str:
        """The summary in one line."""
        means = {name: _number(self.summary[column]["mean"]) for name, column in self._headlines.items()}
        parts = []
        for name, mean in means.items():
            before = means.get(f"{name}_before")
            if name.removesuffix("_before") == name or name.removesuffix("_before") not in means:
                parts.append(f"{name} {mean}" if before is None else f"{name} {before} -> {mean}")
        return ", ".join(parts)


_STATISTICS = ("mean", "std", "median", "min", "max", "count")


def _merge(ranks: list[list[Row]]) -> list[Row]:
    """All ranks' rows in the order of the data (samplers deal items out in turn), without repeated pairs."""
    if len(ranks) == 1:
        return list(ranks[0])
    merged = [row for turn in itertools.zip_longest(*ranks) for row in turn if row is not None]
    seen: dict[Any, Row] = {}
    for index, row in enumerate(merged):
        pair = tuple(row[key] for key in _TEXTS if key in row and key != "error")
        seen.setdefault(pair if all(pair) else index, row)
    return list(seen.values())


def _summarise(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    names = list(dict.fromkeys(key for row in rows for key in row if key not in _TEXTS))
    summary = {}
    for name in names:
        values = torch.tensor(
            [row[name] for row in rows if not math.isnan(row.get(name, math.nan))], dtype=torch.float64
        )
        summary[name] = {**_statistics(values), "nan": len(rows) - len(values)}
    return summary


def _statistics(values: Tensor) -> dict[str, float]:
    if len(values) == 0:
        return {name: 0 if name == "count" else math.nan for name in _STATISTICS}
    spread = float(values.std(unbiased=True)) if len(values) > 1 else math.nan
    middle = float(values.quantile(0.5)) if bool(values.isfinite().all()) else float(values.median())
    return {
        "mean": float(values.mean()),
        "std": spread,
        "median": middle,
        "min": float(values.min()),
        "max": float(values.max()),
        "count": len(values),
    }


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _write(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="nan", lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
