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
"""A table and a picture of how good the predicted uncertainty is, over all pairs of an evaluation."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.handlers.output import claim_folder, engine_output, gather_objects, is_first_rank, replacing

from .calibration import (
    Case,
    area_above_oracle,
    confidence_bins,
    displacement_case,
    label_case,
    quantile_bins,
    sparsification,
    spearman,
)

__all__ = ["CalibrationReport"]

logger = logging.getLogger(__name__)

_IDS = ("moving_id", "fixed_id")
_CASES = {
    "displacement": ("displacement", "mean end-point error left", "root mean square of"),
    "label": ("propagated label", "wrong labels left", "probability of"),
}


class CalibrationReport:
    """Write ``calibration.csv`` and ``calibration.png`` at the end of an evaluation.

    For the displacement (pairs with ``true_ddf``) and for the propagated label (pairs with labels on both sides):

    - the sparsification curve, that is the share of a pair's mean error that is left once the most uncertain voxels
      are taken out; beside it that of an oracle, which takes out the largest errors, and that of chance. Curves are
      means over the pairs, which count alike.
    - the reliability diagram: for displacements, voxels of each pair in equally full bins of the standard deviation,
      whose root mean square is compared with that of the errors; for labels, bins of the most probable label's
      probability, compared with how often it is the true one. Voxels of all pairs count alike.

    The table has a line a point: ``kind``, ``curve``, ``x``, ``y`` and ``count`` (pairs of a curve, voxels of a bin).
    The lines of ``spearman`` and ``area_above_oracle`` have the mean over the pairs in ``y``. Nothing is written where
    no pair has samples and a truth. Attach it on every rank; the first one writes.

    Args:
        output_dir: folder, made and tried when the evaluator starts.
        labels: the labels that count; none for displacements alone.
        bins: of the reliability diagram.
        points: of the sparsification curve, from all voxels to the twentieth part of them.
        filename: of both files, without its ending.

    Example:
        ``CalibrationReport("output", labels=[1, 2]).attach(evaluator)``
    """

    def __init__(
        self,
        output_dir: str | Path,
        labels: Sequence[int] = (),
        bins: int = 10,
        points: int = 20,
        filename: str = "calibration",
    ) -> None:
        if bins < 1 or points < 2:
            raise ValueError(f"bins must be at least 1 and points at least 2, got {bins} and {points}")
        self.output_dir, self.labels, self.bins, self.filename = Path(output_dir), tuple(labels), bins, filename
        self.fractions = torch.linspace(0, 0.95, points, dtype=torch.float64)
        self.rows: list[dict[str, Any]] = []
        self._local: list[tuple[Any, dict[str, dict[str, Any]]]] = []

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self._local.clear()
        if is_first_rank():
            claim_folder(self.output_dir)

    @torch.no_grad()
    def _collect(self, engine: Engine) -> None:
        output = engine_output(engine)
        cases = {"displacement": displacement_case(output), "label": label_case(output, self.labels)}
        for item in range(len(output["ddf"])):
            known = all(output.get(key) is not None for key in _IDS)
            name = tuple(str(output[key][item]) for key in _IDS) if known else None
            found = {kind: self._statistics(case, item) for kind, case in cases.items() if case is not None}
            self._local.append((name, found))

    def _statistics(self, case: Case, item: int) -> dict[str, Any]:
        uncertainty, error = case.of(item)
        curve = sparsification(uncertainty, error, self.fractions)
        oracle = sparsification(error, error, self.fractions)
        probable = case.probabilities is not None
        return {
            "sparsification": curve,
            "oracle": oracle,
            "spearman": spearman(uncertainty, error),
            "area_above_oracle": area_above_oracle(curve, oracle, self.fractions),
            "bins": confidence_bins(case, item, self.bins) if probable else quantile_bins(*case.of(item), self.bins),
        }

    def _finish(self, engine: Engine) -> None:
        pairs = _unique([pair for local in gather_objects(self._local) for pair in local])
        if not is_first_rank():
            return
        kinds = {kind: [found[kind] for found in pairs if kind in found] for kind in _CASES}
        self.rows = [row for kind, found in kinds.items() if found for row in self._summary(kind, found)]
        if not self.rows:
            logger.info("no pair has samples of its field and a truth to judge their spread by: no calibration")
            return
        with replacing(self.output_dir / f"{self.filename}.csv") as temporary:
            _write(temporary, self.rows)
        figure = calibration_figure(self.rows)
        figure.savefig(self.output_dir / f"{self.filename}.png", dpi=110)
        for row in self.rows:
            if row["curve"] == "spearman":
                logger.info(
                    "%s: rank correlation of uncertainty and error %.3f (%d pairs)", row["kind"], row["y"], row["count"]
                )

    def _summary(self, kind: str, found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for name in ("spearman", "area_above_oracle"):
            mean, count = _mean(torch.tensor([pair[name] for pair in found], dtype=torch.float64))
            rows.append({"kind": kind, "curve": name, "x": math.nan, "y": float(mean), "count": int(count)})
        for name in ("sparsification", "oracle"):
            mean, count = _mean(torch.stack([pair[name] for pair in found]))
            points = zip(self.fractions.tolist(), mean.tolist(), count.tolist(), strict=True)
            rows += [{"kind": kind, "curve": name, "x": x, "y": y, "count": n} for x, y, n in points]
        sums = torch.stack([pair["bins"] for pair in found]).sum(0)
        means = sums[:, :2] / sums[:, 2:]
        means = means.sqrt() if kind == "displacement" else means
        for (x, y), n in zip(means.tolist(), sums[:, 2].tolist(), strict=True):
            if n:
                rows.append({"kind": kind, "curve": "reliability", "x": x, "y": y, "count": int(n)})
        return rows


def calibration_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the curves of a table of :class:`CalibrationReport`: a line of panels for each kind."""
    kinds = [kind for kind in _CASES if any(row["kind"] == kind for row in rows)]
    figure = Figure(figsize=(9, 4.2 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for (left, right), kind in zip(axes, kinds, strict=True):
        curves: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["kind"] == kind:
                curves.setdefault(row["curve"], []).append(row)
        _draw_sparsification(left, kind, curves)
        _draw_reliability(right, kind, curves.get("reliability", []))
    return figure


def _draw_sparsification(axis: Axes, kind: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    named = {"sparsification": ("by uncertainty", "#1f77b4", "-"), "oracle": ("by error (oracle)", "0.3", "--")}
    for name, (text, colour, style) in named.items():
        axis.plot(*_points(curves[name]), color=colour, linestyle=style, label=text)
    axis.axhline(1.0, color="0.6", linestyle=":", label="at random")
    title, ordinate, _ = _CASES[kind]
    row = curves["spearman"][0]
    axis.set(xlabel="voxels taken out", ylabel=f"{ordinate}, share", xlim=(0, 1), ylim=(0, None))
    axis.set_title(f"{title}: rank correlation {row['y']:.2f}, {row['count']} pairs", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _draw_reliability(axis: Axes, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    x, y = _points(rows)
    top = max([*x, *y], default=1.0) * 1.05 if kind == "displacement" else 1.0
    axis.plot((0, top), (0, top), color="0.6", linestyle=":", label="calibrated")
    axis.plot(x, y, color="#1f77b4", linewidth=1)
    # A point of few voxels says little: areas are shares of the voxels.
    most = max((row["count"] for row in rows), default=1)
    axis.scatter(x, y, s=[60 * row["count"] / most for row in rows], color="#1f77b4")
    names = ("standard deviation, voxels", "end-point error, voxels")
    names = names if kind == "displacement" else ("the most probable label", "its being right")
    how = _CASES[kind][2]
    axis.set(xlabel=f"{how} {names[0]}", ylabel=f"{how.replace('probability', 'frequency')} {names[1]}")
    axis.set(xlim=(0, top), ylim=(0, top))
    axis.set_title("reliability", fontsize=10)
    axis.legend(fontsize=8, frameon=False, loc="upper left")


def _points(rows: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["x"] for row in rows], [row["y"] for row in rows]


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over pairs (first axis), without those in which there is none; and how many there are."""
    return values.nanmean(0), (~values.isnan()).sum(0)


def _unique(pairs: Sequence[tuple[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Without the pairs that a sampler repeated to fill up the ranks."""
    seen: dict[Any, dict[str, Any]] = {}
    for number, (name, found) in enumerate(pairs):
        seen.setdefault(number if name is None else name, found)
    return list(seen.values())


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["kind", "curve", "x", "y", "count"], lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows])
