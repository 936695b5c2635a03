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
"""Find the hyper-parameters of a hyper network on validation pairs, in few evaluations.

The published search takes a dense grid of 55 x 55 points on every pair, beyond the range that was trained. Here a
coarse grid is measured on some of the pairs, its best points on all of them, and the surroundings of the best at half
the step, twice: about as much as thirty evaluations of all pairs.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.engines import PairValues, autocast, prepare_pair
from common.metrics import MetricCollection

from .landscape import Landscape, Point

__all__ = ["ConditionSearch", "coarse_to_fine", "with_optuna"]

logger = logging.getLogger(__name__)

Range = tuple[float, float]
Measure = Callable[[Point, Sequence[int]], None]

_METHODS = ("grid", "optuna")
# Points of the coarse grid that are measured on all pairs.
_PROMISING = 3


class ConditionSearch:
    """Search (alpha, w), or (sigma, w), for the best objective on listed pairs.

    ``run`` writes ``landscape.csv`` (a row a point), ``landscape.png`` and ``best.json`` to ``output_dir`` and leaves
    the network at the best point. A pair is registered once at each point at most.

    Args:
        network: a hyper network.
        dataset: of pairs, as :class:`common.data.PairDataset` gives them.
        metrics: the measures, with ``ndv`` among them.
        output_dir: folder.
        w_range: lowest and highest w, within what was trained.
        alpha_range: the same of the Beta prior's alpha.
        sigma_range: the same of the Gaussian prior's sigma; give the one that the network has.
        objective: name of the measure that decides. ``dice`` and ``similarity`` are maximised, others minimised.
        max_ndv: the most folded volume, in percent, that the mean over pairs may have; None for any.
        method: "grid", coarse to fine, or "optuna", a tree-structured Parzen estimator.
        grid: points along each axis of the coarse grid.
        refinements: how often the step is halved around the best point.
        evaluations: trials of "optuna".
        early_fraction: part of the pairs that the coarse grid, and at first each trial, is measured on.
        labels: foreground labels, for measures of overlap.
        device: where to run.
        amp: as for the evaluator.
        seed: of "optuna".

    Raises:
        ValueError: for an unknown method or objective, an empty range or a number out of bounds.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset[Any],
        metrics: MetricCollection,
        output_dir: str | Path,
        *,
        w_range: Sequence[float],
        alpha_range: Sequence[float] | None = None,
        sigma_range: Sequence[float] | None = None,
        objective: str = "dice",
        max_ndv: float | None = None,
        method: str = "grid",
        grid: int = 5,
        refinements: int = 2,
        evaluations: int = 30,
        early_fraction: float = 0.5,
        labels: Sequence[int] = (),
        device: str | torch.device = "cpu",
        amp: bool | str = False,
        seed: int = 0,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
        if objective not in metrics.metrics or "ndv" not in metrics.metrics:
            raise ValueError(f"objective '{objective}' and 'ndv' must be measured; there are {list(metrics.metrics)}")
        if (alpha_range is None) == (sigma_range is None):
            raise ValueError(f"give either alpha_range or sigma_range, got {alpha_range} and {sigma_range}")
        if grid < 2 or refinements < 0 or evaluations < 1 or not 0 < early_fraction <= 1:
            raise ValueError(
                "grid must be at least 2, refinements 0, evaluations 1 and early_fraction in (0, 1], got "
                f"{grid}, {refinements}, {evaluations} and {early_fraction}"
            )
        axis, first = ("alpha", alpha_range) if alpha_range is not None else ("sigma", sigma_range)
        ranges = (_checked(axis, first or ()), _checked("w", w_range))
        count = len(dataset)  # type: ignore[arg-type]
        if not count:
            raise ValueError("there is no pair to search on; choose another split")
        self.network = network.to(device).eval()
        self.dataset, self.metrics, self.labels = dataset, metrics, tuple(labels)
        self.output_dir, self.device, self.amp = Path(output_dir), torch.device(device), amp
        self.method, self.grid, self.refinements = method, grid, refinements
        self.evaluations, self.seed = evaluations, seed
        self.early = _spread(count, math.ceil(early_fraction * count))
        self.landscape = Landscape((axis, "w"), ranges, count, objective, max_ndv)
        self._bar: tqdm | None = None

    def run(self) -> dict[str, Any]:
        """Search, write, and say what was found.

        Returns:
            what ``best.json`` holds.
        """
        if self.method == "optuna":
            _import_optuna()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with tqdm(desc="search", unit="pair", disable=not sys.stderr.isatty(), leave=False) as self._bar:
            if self.method == "grid":
                self._bar.total = self._expected()
                coarse_to_fine(self.landscape, self._measure, self.early, self.grid, self.refinements)
            else:
                self._bar.total = self.evaluations * self.landscape.cases
                with_optuna(self.landscape, self._measure, self.early, self.evaluations, self.seed)
        self._condition(self.landscape.best)
        self.landscape.write(self.output_dir)
        self._report()
        return self.landscape.summary()

    def _expected(self) -> int:
        """About how many registrations coarse to fine takes, for the progress bar."""
        every = self.landscape.cases
        return self.grid**2 * len(self.early) + (_PROMISING * (every - len(self.early))) + 8 * every * self.refinements

    def _condition(self, point: Point) -> None:
        self.network.condition(**dict(zip(self.landscape.axes, point, strict=True)))

    def _measure(self, point: Point, cases: Sequence[int]) -> None:
        """Register the cases that are not known yet at this point."""
        known = self.landscape.values.setdefault(point, {})
        missing = [case for case in cases if case not in known]
        if not missing:
            return
        # Point by point, so that the weights of the network are generated once for all pairs.
        self._condition(point)
        for case, batch in zip(missing, DataLoader(Subset(self.dataset, missing), batch_size=1), strict=True):
            known[case] = self._register(batch)
            if self._bar is not None:
                self._bar.update()
        mean = self.landscape.mean(point)
        names = (*self.landscape.axes, self.landscape.objective, "ndv", "cases")
        values = {**dict(zip(self.landscape.axes, point, strict=True)), **mean}
        logger.info("%s", ", ".join(f"{name} {values[name]:.4g}" for name in names))

    def _register(self, batch: dict[str, Any]) -> dict[str, float]:
        image, batch = prepare_pair(batch, self.device)
        with torch.inference_mode():
            start = _now(self.device)
            with autocast(self.device, self.amp):
                fields = self.network.fields(image)
            seconds = image.new_full((1, 1), _now(self.device) - start)
            measured = self.metrics(PairValues(batch, {**fields, "seconds": seconds}, self.labels))
        self.metrics.reset()
        return {name: _mean(value) for name, value in measured.items() if not name.endswith("_before")}

    def _report(self) -> None:
        summary, found = self.landscape.summary(), self.landscape.mean(self.landscape.best)
        where = ", ".join(f"{name} {summary[name]:.4g}" for name in self.landscape.axes)
        logger.info(
            "best: %s with %s %.4g, ndv %.3g %%; %d points, %d registrations; wrote %s",
            where,
            self.landscape.objective,
            found[self.landscape.objective],
            found["ndv"],
            summary["points"],
            summary["registrations"],
            self.output_dir,
        )
        if not summary["allowed"]:
            warnings.warn(
                f"nowhere is NDV at most max_ndv {self.landscape.max_ndv:g} %: the best point is the one of the lowest "
                f"NDV, {found['ndv']:.3g} %",
                stacklevel=3,
            )
        if summary["at_border"]:
            warnings.warn(
                f"the best point touches the {' and the '.join(summary['at_border'])}: the optimum may lie beyond what "
                "the network was trained on; train with a wider range before relying on it",
                stacklevel=3,
            )


def coarse_to_fine(
    landscape: Landscape, measure: Measure, early: Sequence[int], grid: int = 5, refinements: int = 2
) -> None:
    """A grid on the early cases, its best points on all, then the neighbours of the best at half the step each time.

    Args:
        landscape: where ``measure`` puts what it finds; says what is best.
        measure: registers cases at a point, those known already excepted.
        early: the cases for the grid.
        grid: points along an axis; an axis of no length has one.
        refinements: halvings.
    """
    every = range(landscape.cases)
    steps = [(high - low) / (grid - 1) for low, high in landscape.ranges]
    axes = [
        [low + k * step for k in range(grid if step else 1)]
        for (low, _), step in zip(landscape.ranges, steps, strict=True)
    ]
    for point in itertools.product(*axes):
        measure(_rounded(point), early)
    for point in sorted(landscape.values, key=landscape.merit, reverse=True)[:_PROMISING]:
        measure(point, every)
    for _ in range(refinements):
        steps = [step / 2 for step in steps]
        centre = landscape.best
        for signs in itertools.product((-1, 0, 1), repeat=2):
            moved = [c + sign * step for c, sign, step in zip(centre, signs, steps, strict=True)]
            point = _rounded(moved)
            if all(low <= v <= high for v, (low, high) in zip(point, landscape.ranges, strict=True)):
                measure(point, every)


def with_optuna(landscape: Landscape, measure: Measure, early: Sequence[int], evaluations: int, seed: int = 0) -> None:
    """Optuna's TPE sampler; a trial that is below the median on the early cases goes no further.

    Args:
        landscape, measure, early: as for :func:`coarse_to_fine`.
        evaluations: trials.
        seed: of the sampler.

    Raises:
        ModuleNotFoundError: without the package optuna.
    """
    optuna = _import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    study.enqueue_trial({name: sum(ends) / 2 for name, ends in zip(landscape.axes, landscape.ranges, strict=True)})

    def value(point: Point) -> float:
        allowed, merit = landscape.merit(point)
        # A field that folds too much is worse than any that does not, the more so the more it folds.
        return merit if allowed else merit - 1e6

    def trial_value(trial: Any) -> float:
        ranges = zip(landscape.axes, landscape.ranges, strict=True)
        point = _rounded([trial.suggest_float(name, low, high) for name, (low, high) in ranges])
        measure(point, early)
        trial.report(value(point), 0)
        if trial.should_prune():
            raise optuna.TrialPruned
        measure(point, range(landscape.cases))
        return value(point)

    study.optimize(trial_value, n_trials=evaluations)


def _import_optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "method 'optuna' needs the package optuna, which is not installed: pip install 'warpzoo[tune]', or take "
            "method 'grid'"
        ) from error
    return optuna


def _checked(name: str, ends: Sequence[float]) -> Range:
    values = [float(end) for end in ends]
    if len(values) != 2 or not all(map(math.isfinite, values)) or values[0] > values[1]:
        raise ValueError(f"the range of {name} needs its lower and its upper end, got {ends}")
    return values[0], values[1]


def _rounded(point: Sequence[float]) -> Point:
    """To what a command line shows, so that a point met again by another sum is the same point."""
    first, second = (round(float(value), 6) for value in point)
    return first, second


def _spread(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` numbers, evenly spread."""
    return [k * count // chosen for k in range(chosen)]


def _mean(value: Tensor) -> float:
    return float(value.float().nanmean())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
