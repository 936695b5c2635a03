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
"""Losses, metrics, learning rate and pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from common.handlers.output import RunningMeans, engine_output, is_first_rank, measurements
from common.handlers.pictures import PictureHandler

__all__ = ["TensorBoardScalars", "TensorBoardPictures"]


class _Writer:
    """Opens the event file with the first value, so that ranks and runs that write nothing leave no file.

    It stays open, since an evaluator runs many times and each opening makes a new file.
    """

    def __init__(self, log_dir: str | Path, summary_writer: SummaryWriter | None) -> None:
        self.log_dir = Path(log_dir)
        self._writer = summary_writer

    def open(self) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self.log_dir))
        return self._writer

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()


class TensorBoardScalars:
    """Write losses per iteration, means per epoch, the learning rate, and an evaluator's metrics.

    Attach it on every rank: means are taken over all of them, and the first one writes. MONAI evaluators run with the
    trainer's epoch, so that validation metrics share the trainer's axis.

    Args:
        log_dir: folder for the event file.
        every: iterations between two values of each loss.
        optimizer: whose learning rate to write; the trainer's own by default.
        tag: prefix of the names; ``"train"`` for an engine with losses and ``"validation"`` for others by default.
        summary_writer: a writer to share instead of an own one.

    Example:
        ``TensorBoardScalars(log_dir="output/events").attach(trainer)``, and another one for the evaluator.
    """

    def __init__(
        self,
        log_dir: str | Path,
        every: int = 10,
        optimizer: Optimizer | None = None,
        tag: str | None = None,
        summary_writer: SummaryWriter | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self.optimizer = optimizer
        self.tag = tag
        self._writer = _Writer(log_dir, summary_writer)
        self._means = RunningMeans()
        self._losses = False

    def attach(self, engine: Engine) -> None:
        """Follow a trainer or an evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, lambda: self._means.reset())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, lambda: self._writer.flush())

    def _iteration(self, engine: Engine) -> None:
        output = engine_output(engine)
        values = measurements(output)
        self._means.update(values)
        self._losses = output.get("loss") is not None
        if self._losses and is_first_rank() and engine.state.iteration % self.every == 0:
            step = engine.state.iteration
            self._write({f"{self._tag()}_iteration/{name}": float(value) for name, value in values.items()}, step)

    def _epoch(self, engine: Engine) -> None:
        means = self._means.compute(all_ranks=True)
        if not is_first_rank():
            return
        values = {name: value for name, value in engine.state.metrics.items() if isinstance(value, float | int)}
        values.update(means)
        if self._losses:
            values.update(self._learning_rates(engine))
        self._write({f"{self._tag()}/{name}": value for name, value in values.items()}, engine.state.epoch)

    def _learning_rates(self, engine: Engine) -> dict[str, float]:
        optimizer = self.optimizer or getattr(engine, "optimizer", None)
        if optimizer is None:
            return {}
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        return {"learning_rate" if k == 0 else f"learning_rate_{k}": rate for k, rate in enumerate(rates)}

    def _tag(self) -> str:
        return self.tag or ("train" if self._losses else "validation")

    def _write(self, values: Mapping[str, Any], step: int) -> None:
        writer = self._writer.open()
        for name, value in values.items():
            writer.add_scalar(name, value, step)


class TensorBoardPictures(PictureHandler):
    """Draw :func:`common.handlers.figures.registration_figure` of the first pairs of an epoch for TensorBoard.

    Args:
        log_dir: folder for the event file.
        every: epochs between two sets of pictures.
        count: pictures per epoch; 0 for none.
        tag: prefix of the names.
        summary_writer: a writer to share instead of an own one.
        spacing: mm per axis, for the shape of the pictures.
        affine: (4, 4) voxel-to-world matrix (RAS mm) of all fixed images, for anatomical views; without it an
            ``affine`` in the batch's ``fixed_meta`` is used where there is one.
    """

    def __init__(
        self,
        log_dir: str | Path,
        every: int = 1,
        count: int = 1,
        tag: str = "pair",
        summary_writer: SummaryWriter | None = None,
        spacing: Any = None,
        affine: Any = None,
    ) -> None:
        super().__init__(every=every, count=count, spacing=spacing, affine=affine)
        self.tag = tag
        self._writer = _Writer(log_dir, summary_writer)

    def attach(self, engine: Engine) -> None:
        """Follow a trainer or an evaluator."""
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, lambda: self._writer.flush())

    def _keep(self, picture: Any, engine: Engine, index: int, name: str) -> None:
        tag = f"{self.tag}/{index}"
        self._writer.open().add_image(tag, picture, engine.state.epoch, dataformats="HWC")
