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
"""A progress bar with losses or metrics, which turns into sparse log lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

from ignite.engine import Engine, Events
from tqdm import tqdm

from common.handlers.output import RunningMeans, engine_output, is_first_rank, measurements

__all__ = ["LossProgressBar"]

logger = logging.getLogger(__name__)


class LossProgressBar:
    """Show how far an epoch is, with the means since its start of the total and of each loss, or of each metric.

    On a terminal this is a tqdm bar. Elsewhere (a log file, a job's output) a line is logged at the end of each epoch
    and at most every ``line_seconds`` within it. Attach it on every rank: the line of an epoch has means over all
    ranks, what is shown within it those of the first, which alone shows anything.

    Args:
        name: what is being done, such as ``"train"`` or ``"validate"``.
        refresh_seconds: least time between two readings of the losses, each of which waits for the device.
        line_seconds: least time between two lines of one epoch where there is no terminal.
        terminal: whether to draw a bar; found out from stderr when None.

    Example:
        ``LossProgressBar("train").attach(trainer)``
    """

    def __init__(
        self,
        name: str = "train",
        refresh_seconds: float = 0.5,
        line_seconds: float = 60.0,
        terminal: bool | None = None,
    ) -> None:
        self.name = name
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self.pause = refresh_seconds if self.terminal else line_seconds
        self._means = RunningMeans()
        self._bar: tqdm | None = None
        self._shown = 0.0

    def attach(self, engine: Engine) -> None:
        """Follow a trainer or an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        engine.add_event_handler(Events.COMPLETED | Events.TERMINATE, self._close)

    def _start(self, engine: Engine) -> None:
        self._means.reset()
        self._shown = time.monotonic()
        self._close()  # of a run that ended with an error
        if self.terminal and is_first_rank():
            self._bar = tqdm(total=engine.state.epoch_length, desc=self._title(engine), leave=False, dynamic_ncols=True)

    def _step(self, engine: Engine) -> None:
        self._means.update(measurements(engine_output(engine)))
        if self._bar is not None:
            self._bar.update()
        if is_first_rank() and time.monotonic() - self._shown >= self.pause:
            self._shown = time.monotonic()
            self._show(engine)

    def _show(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_listed(self._means.compute()), refresh=True)
        else:
            length = engine.state.epoch_length or 0
            done = engine.state.iteration - (engine.state.epoch - 1) * length
            logger.info("%s %d/%d: %s", self._title(engine), done, length, _listed(self._means.compute()))

    def _finish(self, engine: Engine) -> None:
        self._close()
        means = self._means.compute(all_ranks=True)
        if is_first_rank():
            logger.info("%s: %s", self._title(engine), _listed(means))

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _title(self, engine: Engine) -> str:
        return f"{self.name} epoch {engine.state.epoch}/{engine.state.max_epochs}"


def _listed(means: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in means.items())
