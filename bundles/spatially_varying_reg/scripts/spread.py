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
"""Validate a hyper network over its whole range, not at one point of it."""

from __future__ import annotations

import torch.distributed as dist
from ignite.engine import Engine, Events

from .hyper import HyperTransMorphSPR

__all__ = ["SpreadConditions"]

# Steps of the R2 sequence: 1/g and 1/g^2 of g = 1.3247..., the root of g^3 = g + 1 (Roberts, 2018). Any number of
# first points of it covers the square evenly.
_STEPS = (0.7548776662466927, 0.5698402909980532)


class SpreadConditions:
    """Give every pair of an evaluator its own hyper-parameters, spread evenly over the trained range.

    Pair k is registered at point k of a low-discrepancy sequence that begins in the middle, in each epoch the same, so
    that the mean over the pairs stands for the whole range at the price of one registration a pair. A network that is
    best at one point of the range need not be best at another, so no point alone can choose the epoch to keep.

    Args:
        network: the hyper network that the evaluator calls; batches have one pair.
        alpha: fixed for all pairs instead.
        sigma: fixed for all pairs instead.
        w: fixed for all pairs instead.
    """

    def __init__(
        self,
        network: HyperTransMorphSPR,
        alpha: float | None = None,
        sigma: float | None = None,
        w: float | None = None,
    ) -> None:
        self.network = network
        self.fixed = {name: v for name, v in (("alpha", alpha), ("sigma", sigma), ("w", w)) if v is not None}
        self._count = 0

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._condition)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._release)

    def point(self, pair: int) -> dict[str, float]:
        """The hyper-parameters of pair number ``pair``."""
        ranges = self.network.conditioning.ranges
        spread = {
            name: low + (high - low) * ((0.5 + pair * step) % 1.0)
            for step, (name, (low, high)) in zip(_STEPS, ranges.items(), strict=True)
        }
        return {**spread, **self.fixed}

    def _start(self, engine: Engine) -> None:
        self._count = 0

    def _condition(self, engine: Engine) -> None:
        # Samplers deal pairs out to the ranks in turn.
        parallel = dist.is_available() and dist.is_initialized()
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if parallel else (1, 0)
        self.network.condition(**self.point(self._count * ranks + rank))
        self._count += 1

    def _release(self, engine: Engine) -> None:
        """In training the open ones are drawn at random again."""
        self.network.condition(**self.fixed)
