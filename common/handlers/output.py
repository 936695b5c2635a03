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
"""What handlers read from an engine: its output, and means over an epoch and over ranks."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine
from torch import Tensor

from common.metrics.base import gather_objects

__all__ = [
    "RunningMeans",
    "claim_folder",
    "engine_output",
    "gather_objects",
    "is_first_rank",
    "measurements",
    "rank",
    "replacing",
]


def is_first_rank() -> bool:
    """Whether this process is the one that writes files."""
    return rank() == 0


def rank() -> int:
    """The number of this process among those that train together; 0 for one alone."""
    # Not ignite.distributed: it remembers a process group that has been destroyed.
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def engine_output(engine: Engine) -> Mapping[str, Any]:
    """The output of an engine of :mod:`common.engines`, a dict.

    Raises:
        TypeError: when the output is of another kind, for instance a list because the engine decollates batches.
    """
    output = engine.state.output
    if not isinstance(output, Mapping):
        raise TypeError(f"the engine's output must be a dict (with decollate=False), got {type(output).__name__}")
    return output


def measurements(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named numbers of an iteration: ``loss`` and the terms of a trainer, the metrics of an evaluator."""
    values = {}
    if output.get("loss") is not None:
        values["loss"] = output["loss"]
    values.update(output.get("losses") or {})
    values.update(output.get("metrics") or {})
    return {name: torch.as_tensor(value).detach() for name, value in values.items()}


class RunningMeans:
    """Means of named values since the last reset; NaN entries do not count.

    Sums stay on the device the values come from: only :meth:`compute` waits for it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars, or rows (B, K) of which each counts with its mean."""
        for name, value in values.items():
            rows = value.detach().double() if value.device.type != "mps" else value.detach().float()
            rows = rows.reshape(1, 1) if rows.ndim == 0 else rows.reshape(rows.shape[0], -1)
            means = rows.nanmean(1)
            new = (means.nansum(), (~means.isnan()).sum())
            old = self._sums.get(name)
            self._sums[name] = new if old is None else (old[0] + new[0], old[1] + new[1])

    def compute(self, *, all_ranks: bool = False) -> dict[str, float]:
        """The means; with ``all_ranks`` over all processes, each of which must then call this."""
        sums = {name: (float(total), int(count)) for name, (total, count) in self._sums.items()}
        if all_ranks:
            sums = _add_up(gather_objects(sums))
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._sums = {}


def _add_up(ranks: list[dict[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """Ranks need not have the same names: one may have had no pair with labels."""
    names = dict.fromkeys(name for sums in ranks for name in sums)
    nothing = (0.0, 0)
    return {name: tuple(map(sum, zip(*(sums.get(name, nothing) for sums in ranks), strict=True))) for name in names}  # type: ignore[misc]


def claim_folder(path: Path) -> None:
    """Make a folder for results and try it, before hours of work turn out to have nowhere to go.

    Raises:
        OSError: when nothing can be written there; names the folder and the reason.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"results cannot be written to {path} ({error}): choose another output_dir") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that becomes ``path`` when the block ends well, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
