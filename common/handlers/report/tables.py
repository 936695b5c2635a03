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

_BEFORE = "_before"
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
    """One row a measure, the mean of its values: before, after and the change."""
    rows = []
    for name, before, after in _paired(given):
        count = max(len(before), len(after))
        title = _MEASURES.get(name, name) + (f", mean of {count} labels" if count > 1 else "")
        first, second = _mean(before), _mean(after)
        change = f"{second - first:+.4g}" if math.isfinite(second - first) else ""
        rows.append((title, number(first) if before else "", number(second) if after else "", change))
    return table(("measure", "before", "after", "change"), rows, numbers=True)


def details_of_labels(given: Mapping[str, Measure], names: Sequence[str | int]) -> str:
    """One row a label, for measures that have one value each; empty without any."""
    several = [(name, b, a) for name, b, a in _paired(given) if max(len(b), len(a)) > 1]
    if not several:
        return ""
    head, columns = ["label"], []
    for name, before, after in several:
        for values, when in ((before, "before"), (after, "after")):
            if values:
                head.append(f"{name} {when}")
                columns.append(values)
    count = max(len(values) for values in columns)
    called = [str(name) for name in names] if len(names) == count else [f"number {k + 1}" for k in range(count)]
    rows = [(called[k], *(number(v[k]) if k < len(v) else "" for v in columns)) for k in range(count)]
    return f"<details><summary>Each label</summary>{table(head, rows, numbers=True)}</details>"


def number(value: float | None) -> str:
    """Four digits; what has no value was not measured."""
    if value is None or math.isnan(value):
        return "not measured"
    return f"{value:.4g}" if math.isfinite(value) else "infinite"


def _grid(role: str, scan: Scan) -> tuple[str, ...]:
    shape = " × ".join(str(n) for n in scan.array.shape)
    spacing = " × ".join(f"{mm:.4g}" for mm in scan.spacing)
    return role, scan.path.name, shape, spacing, scan.orientation


def _paired(given: Mapping[str, Measure]) -> list[tuple[str, list[float], list[float]]]:
    """Name, values before and values after, in the order in which names appear."""
    names = dict.fromkeys(name.removesuffix(_BEFORE) for name in given)
    return [(name, _values(given, name + _BEFORE), _values(given, name)) for name in names]


def _values(given: Mapping[str, Measure], name: str) -> list[float]:
    if name not in given:
        return []
    value = given[name]
    several = value if isinstance(value, Sequence) else [value]
    return [math.nan if v is None else float(v) for v in several]


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return float(np.mean(measured)) if measured else math.nan
