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
"""What a hyper network does at each of its hyper-parameters: a table, a picture, and the best of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

__all__ = ["Landscape", "Point"]

Point = tuple[float, float]

# Of measures that an objective may be; of all others more is worse.
_HIGHER_IS_BETTER = ("dice", "similarity")


@dataclass
class Landscape:
    """Measures of cases at points (hyperprior's strength, w).

    Attributes:
        axes: names of the two numbers, such as ``("alpha", "w")``.
        ranges: lowest and highest value of each, those that the network was trained on.
        cases: how many there are.
        objective: the measure that decides.
        max_ndv: percent of folded volume that a solution may have, or None.
        values: by point, by case, by measure.
    """

    axes: tuple[str, str]
    ranges: tuple[tuple[float, float], tuple[float, float]]
    cases: int
    objective: str
    max_ndv: float | None = None
    values: dict[Point, dict[int, Mapping[str, float]]] = field(default_factory=dict)

    def mean(self, point: Point, among: Collection[int] | None = None) -> dict[str, float]:
        """Each measure at a point, averaged over the cases in which it exists; and how many cases were measured.

        Args:
            point: one that was measured.
            among: the cases that count; all by default.
        """
        cases = [case for number, case in self.values[point].items() if among is None or number in among]
        names = list(dict.fromkeys(name for case in cases for name in case))
        columns = {name: [case[name] for case in cases if not math.isnan(case.get(name, math.nan))] for name in names}
        means = {name: sum(column) / len(column) if column else math.nan for name, column in columns.items()}
        return {**means, "cases": len(cases)}

    def merit(self, point: Point) -> tuple[bool, float]:
        """What to sort points by: whether NDV is low enough, then the objective (or, if it is not, NDV), upwards."""
        mean = self.mean(point)
        if not self.allowed(point):
            return False, -mean["ndv"]
        value = mean[self.objective]
        if math.isnan(value):
            return True, -math.inf
        return True, value if self.objective in _HIGHER_IS_BETTER else -value

    def allowed(self, point: Point) -> bool:
        """Whether the fields at a point fold no more than ``max_ndv``."""
        return self.max_ndv is None or self.mean(point)["ndv"] <= self.max_ndv

    @property
    def best(self) -> Point:
        """The best point among those that all cases were measured at, or if there is none among all."""
        whole = [point for point, cases in self.values.items() if len(cases) == self.cases]
        return max(whole or self.values, key=self.merit)

    @property
    def at_border(self) -> list[str]:
        """Which ends of the ranges the best point touches, such as ``"upper end of w, 5"``."""
        ends = []
        for name, value, (low, high) in zip(self.axes, self.best, self.ranges, strict=True):
            close = 1e-6 * (high - low)
            if high > low and value <= low + close:
                ends.append(f"lower end of {name}, {low:g}")
            if high > low and value >= high - close:
                ends.append(f"upper end of {name}, {high:g}")
        return ends

    @property
    def shared(self) -> set[int]:
        """The cases that were measured at every point."""
        return set.intersection(*(set(cases) for cases in self.values.values()))

    def rows(self, among: Collection[int] | None = None) -> list[dict[str, float]]:
        """A row a point: its two numbers, the means, the number of cases; ``among`` as for :meth:`mean`."""
        points = sorted(self.values)
        return [{**dict(zip(self.axes, point, strict=True)), **self.mean(point, among)} for point in points]

    def summary(self) -> dict[str, Any]:
        """The best point and what is to be known of it."""
        return {
            **dict(zip(self.axes, self.best, strict=True)),
            "objective": self.objective,
            "max_ndv": self.max_ndv,
            "allowed": self.allowed(self.best),
            "at_border": self.at_border,
            "measured": self.mean(self.best),
            "points": len(self.values),
            "registrations": sum(len(cases) for cases in self.values.values()),
        }

    def write(self, folder: Path) -> None:
        """Write ``landscape.csv``, ``landscape.png`` and ``best.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        with open(folder / "landscape.csv", "w", newline="", encoding="utf-8") as stream:
            columns = list(dict.fromkeys(name for row in rows for name in row if name != "cases"))
            writer = csv.DictWriter(stream, [*columns, "cases"], restval="nan", lineterminator="\n")
            writer.writeheader()
            writer.writerows([{k: f"{v:.7g}" for k, v in row.items()} for row in rows])
        figure = self.picture()
        FigureCanvasAgg(figure)
        figure.savefig(folder / "landscape.png", dpi=110)
        # JSON has no NaN: what could not be measured is null.
        summary = self.summary()
        measured = {k: None if math.isnan(v) else v for k, v in summary["measured"].items()}
        text = json.dumps({**summary, "measured": measured}, indent=2)
        (folder / "best.json").write_text(text + "\n", encoding="utf-8")

    def picture(self) -> Figure:
        """The objective and NDV over the two numbers; dots where all cases were measured, rings where some were.

        What is drawn is the mean over the cases that all points share: means over other cases are not comparable.
        """
        figure = Figure(figsize=(10.5, 4.4))
        shared = self.shared
        rows = self.rows(shared)
        for left, name, colours in ((0.07, self.objective, "viridis"), (0.57, "ndv", "magma")):
            axis = figure.add_axes((left, 0.13, 0.34, 0.71), label=name)
            self._panel(figure, axis, rows, name, colours)
            axis.set(xlabel=self.axes[0], ylabel=self.axes[1], title=f"{name}{', %' if name == 'ndv' else ''}")
            axis.locator_params(nbins=6)
            axis.plot(*self.best, marker="*", markersize=17, color="#ff2d2d", markeredgecolor="white", clip_on=False)
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.axes, self.best, strict=True))
        of = "" if len(shared) == self.cases else f"; drawn: means over {len(shared)} of {self.cases} pairs"
        figure.suptitle(f"best: {values}{of}", fontsize=11)
        return figure

    def _panel(self, figure: Figure, axis: Axes, rows: Sequence[Mapping[str, float]], name: str, colours: str) -> None:
        known = [row for row in rows if not math.isnan(row[name])]
        x, y, z = (np.array([row[key] for row in known]) for key in (*self.axes, name))
        triangles = _triangles(x, y, self.ranges)
        if triangles is not None:
            shown = axis.tricontourf(triangles, z, levels=_levels(z), cmap=colours)
            place = axis.get_position()
            bar = figure.add_axes((place.x1 + 0.015, place.y0, 0.015, place.height), label=f"{name}_scale")
            figure.colorbar(shown, cax=bar, format="%.3g", ticks=MaxNLocator(6))
            if name == "ndv" and self.max_ndv is not None and z.min() < self.max_ndv < z.max():
                axis.tricontour(triangles, z, levels=[self.max_ndv], colors="white", linestyles="dashed")
        whole = np.array([len(self.values[row[self.axes[0]], row[self.axes[1]]]) == self.cases for row in known], bool)
        marks: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 5, "clip_on": False}
        axis.plot(x[whole], y[whole], color="white", markeredgecolor="black", **marks)
        axis.plot(x[~whole], y[~whole], color="none", markeredgecolor="0.6", **marks)


def _triangles(x: np.ndarray, y: np.ndarray, ranges: Sequence[tuple[float, float]]) -> Triangulation | None:
    """Triangles between the points, found where both ranges have the same length; None of points on a line."""
    scaled = [(v - low) / ((high - low) or 1.0) for v, (low, high) in zip((x, y), ranges, strict=True)]
    if len(x) < 3 or np.linalg.matrix_rank(np.stack(scaled, 1) - [s.mean() for s in scaled], tol=1e-6) < 2:
        return None
    return Triangulation(x, y, Triangulation(*scaled).triangles)


def _levels(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high if high > low else low + max(abs(low), 1.0) * 1e-3, 15)
