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
"""The weight of a loss term as a function of the epoch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from ignite.engine import Engine, Events

from common.handlers.output import is_first_rank

__all__ = ["LossWeightSchedule"]

logger = logging.getLogger(__name__)


class _Weighted(Protocol):
    """What is needed of ``common.losses.WeightedLosses``."""

    weights: dict[str, float]


class LossWeightSchedule:
    """Change the weight of one loss term while a trainer runs, linearly between given points.

    Set before every iteration from the epochs done by its end, as a fraction: in epochs of n iterations the third
    iteration has ``3 / n``. So nothing has to be kept in a checkpoint, and a run that resumes goes on with the weight
    it would have had. Before the first point its weight holds, after the last that of the last. While a weight is 0 the
    term is not computed. A weight that has changed is logged at the end of the epoch.

    Args:
        losses: the trainer's ``WeightedLosses``.
        term: the name of the term.
        points: (epoch, weight), epochs ascending: ``[[30, 0], [31, 40]]`` is 0 for 30 epochs, and 40 from the end of
            the next one on.

    Raises:
        KeyError: when there is no such term; names those there are.
        ValueError: when there is no point, epochs do not ascend, or a weight is negative or not finite.

    Example:
        ``LossWeightSchedule(losses, "group_consistency", [[30, 0], [31, 40]]).attach(trainer)``
    """

    def __init__(self, losses: _Weighted, term: str, points: Sequence[Sequence[float]]) -> None:
        if term not in losses.weights:
            raise KeyError(f"LossWeightSchedule: no loss term '{term}'; there are {sorted(losses.weights)}")
        self.losses, self.term = losses, term
        self.epochs, self.weights = _checked(points)
        self._logged = losses.weights[term]

    def attach(self, engine: Engine) -> None:
        """Follow a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log)

    def _set(self, engine: Engine) -> None:
        # The iteration counts over all epochs, and the one that starts is counted already.
        done = engine.state.iteration / (engine.state.epoch_length or 1)
        self.losses.weights[self.term] = float(np.interp(done, self.epochs, self.weights))

    def _log(self, engine: Engine) -> None:
        weight = self.losses.weights[self.term]
        if weight != self._logged and is_first_rank():
            logger.info("epoch %d: the weight of '%s' is now %.4g", engine.state.epoch, self.term, weight)
        self._logged = weight


def _checked(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Epochs and weights of points that make a schedule."""
    if not points or any(len(point) != 2 for point in points):
        raise ValueError(f"LossWeightSchedule: points must be pairs (epoch, weight), at least one, got {points!r}")
    epochs, weights = ([float(number) for number in column] for column in zip(*points, strict=True))
    if not np.isfinite(epochs).all() or any(later <= earlier for earlier, later in pairwise(epochs)):
        raise ValueError(f"LossWeightSchedule: epochs must ascend, got {epochs}")
    if not np.isfinite(weights).all() or min(weights) < 0:
        raise ValueError(f"LossWeightSchedule: weights must be finite and not negative, got {weights}")
    return epochs, weights
