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
"""The tables of a report, as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from common.handlers.report.inputs import Measure, ReportInputs
from common.io import Scan

__all__ = ["details_of_labels", "facts", "grids", "measures", "table", "timings"]

# Suffixes of measures and when they were taken; what came before the network is "before" if nothing came before that.
_STAGES = {"_initial": "by the headers", "_before": "before", "_network": "network alone", "": "after"}
_ALIGNED = "after the affine map"
_MEASURES = {
    "dice": "Dice (1 is perfect)",
    "similarity": "LNCC similarity (1 is perfect)",
    "hd95": "HD95, mm",
    "asd": "average surface distance, mm",
    "tre": "distance of landmarks (TRE), mm",
    "ndv": "non-diffeomorphic volume, %",
    "folds": "folded voxels, %",
    "sdlogj": "standard deviation of log J",
    "epe": "end-point error, voxels",
    "inverse_consistency": "inverse consistency, voxels",
    "inversion_iterations": "iterations of the inversion",
    "seconds": "seconds in the network",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Rows of text; the first of each row names it. ``numbers``: the other columns are aligned right."""
    kind = ' class="number"' if numbers else ' class="name"'
    top = "".join(f'<th scope="col"{kind if k and numbers else ""}>{escape(text)}</th>' for k, text in enumerate(head))
    body = "".join(
        f'<tr><th scope="row" class="name">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(entries: Mapping[str, Any], head: tuple[str, str]) -> str:
    """What is called how."""
    return table(head, [(name, str(value)) for name, value in entries.items()])


def grids(inputs: ReportInputs) -> str:
    """Where the voxels of both files lie."""
    rows = [_grid("moving", inputs.moving), _grid("fixed", inputs.fixed)]
    return table(("", "file", "shape", "voxel size, mm", "axes run to"), rows)


def timings(seconds: Mapping[str, float]) -> str:
    """Each stage, and all of them."""
    rows = [(name, number(value)) for name, value in seconds.items()]
    if len(rows) > 1:
        rows.append(("together", number(math.fsum(seconds.values()))))
    return table(("stage", "seconds"), rows, numbers=True)


def measures(given: Mapping[str, Measure]) -> str:
    """One row a measure, the mean of its values: at each stage that anything was measured at, and the change."""
    staged, heads = _staged(given), _heads(given)
    rows = []
    for name, stages in staged.items():
        count = max(map(len, stages.values()))
        title = _MEASURES.get(name, name) + (f", mean of {count} labels" if count > 1 else "")
        means = {suffix: _mean(values) for suffix, values in stages.items()}
        first = next((means[suffix] for suffix in ("_initial", "_before") if suffix in means), math.nan)
        change = means.get("", math.nan) - first
        cells = [number(means[suffix]) if suffix in means else "" for suffix in heads]
        rows.append((title, *cells, f"{change:+.4g}" if math.isfinite(change) else ""))
    return table(("measure", *heads.values(), "change"), rows, numbers=True)


def details_of_labels(given: Mapping[str, Measure], names: Sequence[str | int]) -> str:
    """One row a label, for measures that have one value each; empty without any."""
    heads = _heads(given)
    columns: dict[str, list[float]] = {}
    for name, stages in _staged(given).items():
        if max(map(len, stages.values())) > 1:
            columns |= {f"{name} {heads[suffix]}": stages[suffix] for suffix in heads if suffix in stages}
    if not columns:
        return ""
    count = max(map(len, columns.values()))
    called = [str(name) for name in names] if len(names) == count else [f"number {k + 1}" for k in range(count)]
    rows = [(called[k], *(number(v[k]) if k < len(v) else "" for v in columns.values())) for k in range(count)]
    return f"<details><summary>Each label</summary>{table(('label', *columns), rows, numbers=True)}</details>"


def number(value: float | None) -> str:
    """Four digits; what has no value was not measured."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:.4g}" if math.isfinite(value) else "infinite"


def _grid(role: str, scan: Scan) -> tuple[str, ...]:
    shape = " × ".join(str(n) for n in scan.array.shape)
    spacing = " × ".join(f"{mm:.4g}" for mm in scan.spacing)
    return role, scan.path.name, shape, spacing, scan.orientation


def _staged(given: Mapping[str, Measure]) -> dict[str, dict[str, list[float]]]:
    """The values of each measure by the suffix of their stage, in the order in which names appear."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in given:
        suffix = next(suffix for suffix in _STAGES if name.endswith(suffix))
        found.setdefault(name.removesuffix(suffix), {})[suffix] = _values(given, name)
    return found


def _heads(given: Mapping[str, Measure]) -> dict[str, str]:
    """What each stage that there is a column for is called, by its suffix."""
    taken = {suffix for stages in _staged(given).values() for suffix in stages} | {"_before", ""}
    heads = {suffix: text for suffix, text in _STAGES.items() if suffix in taken}
    return {**heads, "_before": _ALIGNED} if "_initial" in taken else heads


def _values(given: Mapping[str, Measure], name: str) -> list[float]:
    value = given[name]
    several = value if isinstance(value, Sequence) else [value]
    return [math.nan if v is None else float(v) for v in several]


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else math.nan
