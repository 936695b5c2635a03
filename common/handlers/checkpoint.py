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
"""Checkpoints without pickled objects: the best network, and the last state of a run to go on from."""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.handlers.output import (
    RunningMeans,
    claim_folder,
    engine_output,
    gather_objects,
    is_first_rank,
    measurements,
    rank,
    replacing,
)

__all__ = ["SafeCheckpoint", "CheckpointError", "save_checkpoint", "load_checkpoint", "resume_from", "unwrap"]

logger = logging.getLogger(__name__)

_RESERVED = ("trainer", "best", "rng", "scaler_of_trainer")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


def unwrap(module: Any) -> Any:
    """The network inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers."""
    while True:
        if isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        elif isinstance(module, nn.Module) and hasattr(module, "_orig_mod"):
            module = module._orig_mod
        else:
            return module


def save_checkpoint(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values so that ``torch.load(weights_only=True)`` reads them.

    The file appears whole or not at all, also when the process is killed while writing.

    Args:
        path: the file; its folder is made.
        content: nested dicts and lists of tensors (moved to the CPU), numbers, strings.

    Raises:
        TypeError: when there is an object of another kind; the message names where.
    """
    path = Path(path)
    plain = _plain(content, path.name)
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        torch.save(plain, stream)
        stream.flush()
        os.fsync(stream.fileno())


def load_checkpoint(
    path: str | Path, network: nn.Module | None = None, *, map_location: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint without running any code from it.

    Args:
        path: ``model.pt`` (a state dict) or ``last.pt`` (a run's state, the network's part under ``model``).
        network: load the weights into this network too; wrappers around it do not matter.
        map_location: where the tensors go.

    Returns:
        the file's content.

    Raises:
        FileNotFoundError: when there is no such file; the message lists the checkpoints beside it.
        CheckpointError: when the file is damaged or holds pickled objects, or the weights are of another network.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no checkpoint at {path}; in that folder there is {beside or 'none'}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds pickled Python objects, which could run code when loaded, and is refused. "
            f"Save the network's state_dict() instead. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a dict of weights, got {type(content).__name__}")
    if network is not None:
        weights = content["model"] if isinstance(content.get("model"), dict) else content
        _load_weights(unwrap(network), weights, path)
    return content


def resume_from(
    path: str | Path,
    trainer: Engine,
    objects: Mapping[str, Any],
    checkpoint: SafeCheckpoint | None = None,
) -> None:
    """Bring a run back to where its ``last.pt`` was written, so that it goes on to the same result.

    Restores the objects, the trainer's epoch and iteration and this rank's random states, the latter again when the
    trainer starts, since building things in between may draw numbers. Call it before ``trainer.run()``.

    Args:
        path: a ``last.pt`` of :class:`SafeCheckpoint`.
        trainer: an engine that has not run yet, with the ``max_epochs`` to reach in all.
        objects: those given to :class:`SafeCheckpoint`.
        checkpoint: the handler of this run, to go on from the best value so far.

    Raises:
        CheckpointError: when the file is no ``last.pt``, lacks one of the objects, or the run is already complete, be
            it that its schedule has brought the learning rate to 0.
        FileNotFoundError: when there is no such file.

    Warns:
        UserWarning: when a schedule was made with other settings than this run's; the file's goes on.
    """
    content = load_checkpoint(path)
    missing = [name for name in ("trainer", "rng", *objects) if name not in content]
    if missing:
        raise CheckpointError(f"{path} cannot be resumed from: it lacks {missing} and has {sorted(content)[:12]}")
    progress = content["trainer"]
    limit = trainer.state.max_epochs
    if limit is not None and progress["epoch"] >= limit:
        # Ignite takes a finished run for a new one and would start over at epoch 1.
        raise CheckpointError(
            f"{path} is at epoch {progress['epoch']} and max_epochs is {limit}: nothing is left to do"
        )
    for name, target in objects.items():
        _restore(target, content[name], Path(path))
    _require_learning(objects, Path(path), limit)
    trainer.state.epoch, trainer.state.iteration = progress["epoch"], progress["iteration"]
    if checkpoint is not None:
        checkpoint.restore_best(content["best"]["value"], content["best"]["epoch"])
    _restore_random(content["rng"])
    _at_start(trainer, content)


class SafeCheckpoint:
    """Keep the best network in ``model.pt`` and the state of the run in ``last.pt``.

    ``model.pt`` is the plain state dict of the network: no ``module.`` prefix, on the CPU, the same whatever the
    number of ranks. ``last.pt`` is for :func:`resume_from`. Both are written by the first rank only, but attach the
    handler on every rank: each contributes its random states. ``last.pt`` is written after all other handlers of the
    end of an epoch, so that it holds the scheduler's step wherever this handler stands in the list.

    Args:
        save_dir: folder of the two files.
        objects: what to save, by name: ``"model"`` is the network; the rest has ``state_dict`` and
            ``load_state_dict`` (optimizer, lr_scheduler, ...). The trainer's gradient scaler is included.
        evaluator: the engine whose key metric decides; without one ``model.pt`` follows ``last.pt``.
            When a run ends before it was measured once, ``model.pt`` holds the last weights, and a warning says so.
        key_metric: name of the metric, in the evaluator's ``state.metrics`` or else the mean in its output.
        negative: the lower the metric the better.
        interval: epochs between two ``last.pt``; there is one at the end in any case.
        resume: a ``last.pt`` to go on from when the handler is attached; True takes the one in ``save_dir`` if there
            is one and otherwise starts afresh.

    Raises:
        ValueError: when ``objects`` has no ``"model"`` or a reserved name, or an evaluator but no metric is given.

    Example:
        ``SafeCheckpoint("models", {"model": network, "optimizer": opt}, evaluator, key_metric="dice").attach(trainer)``
    """

    def __init__(
        self,
        save_dir: str | Path,
        objects: Mapping[str, Any],
        evaluator: Engine | None = None,
        key_metric: str | None = None,
        negative: bool = False,
        interval: int = 1,
        resume: str | Path | bool | None = None,
    ) -> None:
        if "model" not in objects or set(objects) & set(_RESERVED):
            raise ValueError(f"objects must have 'model' and none of {_RESERVED}, got {list(objects)}")
        if (evaluator is None) != (key_metric is None):
            raise ValueError("an evaluator and key_metric go together: give both or neither")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}")
        self.save_dir = Path(save_dir)
        self.objects = dict(objects)
        self.evaluator, self.key_metric, self.negative = evaluator, key_metric, negative
        self.interval = interval
        self.resume = self.save_dir / "last.pt" if resume is True else resume or None
        self._resume_if_there = resume is True
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._means = RunningMeans()
        self._saved_epoch: int | None = None

    def attach(self, trainer: Engine) -> None:
        """Follow a trainer, and the evaluator given."""
        # Handlers run in the order they were added: adding ours when the run starts makes it the last one.
        trainer.add_event_handler(Events.STARTED, self._started)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_STARTED, lambda: self._means.reset())
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._measure)
            self.evaluator.add_event_handler(Events.COMPLETED, self._validated)
        if self.resume is not None and not (self._resume_if_there and not Path(self.resume).is_file()):
            resume_from(self.resume, trainer, self.objects, self)

    def restore_best(self, value: float | None, epoch: int | None) -> None:
        """Go on from the best value of an earlier run, here and in a MONAI evaluator."""
        self.best, self.best_epoch = value, epoch
        if value is not None and self.evaluator is not None and hasattr(self.evaluator.state, "best_metric_epoch"):
            self.evaluator.state.best_metric, self.evaluator.state.best_metric_epoch = value, epoch

    def _started(self, trainer: Engine) -> None:
        if is_first_rank():
            claim_folder(self.save_dir)
        if not trainer.has_event_handler(self._epoch_completed):
            trainer.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._epoch_completed)
            trainer.add_event_handler(Events.COMPLETED, self._completed)

    def _measure(self, evaluator: Engine) -> None:
        self._means.update(measurements(engine_output(evaluator)))

    def _validated(self, evaluator: Engine) -> None:
        value = self._key_value(evaluator)
        if math.isnan(value) or not self._better(value):
            return
        self.best, self.best_epoch = value, evaluator.state.epoch
        if is_first_rank():
            save_checkpoint(self.save_dir / "model.pt", unwrap(self.objects["model"]).state_dict())
            logger.info("model.pt: best %s so far, %.5g, epoch %d", self.key_metric, value, evaluator.state.epoch)

    def _key_value(self, evaluator: Engine) -> float:
        values = {**self._means.compute(all_ranks=True), **evaluator.state.metrics}
        if self.key_metric not in values:
            raise KeyError(f"the key metric '{self.key_metric}' is not among the evaluator's {sorted(values)}")
        return float(values[self.key_metric])

    def _better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value < self.best if self.negative else value > self.best

    def _completed(self, trainer: Engine) -> None:
        # A run that was stopped within an epoch goes on from the end of the one before.
        whole = trainer.state.iteration == trainer.state.epoch * (trainer.state.epoch_length or 0)
        if whole and self._saved_epoch != trainer.state.epoch:
            self._epoch_completed(trainer)
        if self.evaluator is not None and self.best is None and is_first_rank():
            logger.warning("%s was never measured: model.pt holds the weights at the end of the run", self.key_metric)
            save_checkpoint(self.save_dir / "model.pt", unwrap(self.objects["model"]).state_dict())

    def _epoch_completed(self, trainer: Engine) -> None:
        self._saved_epoch = trainer.state.epoch
        content = self.content(trainer)
        if is_first_rank():
            save_checkpoint(self.save_dir / "last.pt", content)
            if self.evaluator is None:
                save_checkpoint(self.save_dir / "model.pt", content["model"])

    def content(self, trainer: Engine) -> dict[str, Any]:
        """What ``last.pt`` holds; every rank must call this at the same time."""
        content = {name: unwrap(item).state_dict() for name, item in self.objects.items()}
        content["trainer"] = {"epoch": trainer.state.epoch, "iteration": trainer.state.iteration}
        content["best"] = {"name": self.key_metric, "value": self.best, "epoch": self.best_epoch}
        content["rng"] = _all_random_states()
        scaler = getattr(trainer, "scaler", None)
        content["scaler_of_trainer"] = scaler.state_dict() if scaler is not None else None
        return content


def _plain(value: Any, where: str) -> Any:
    """Copy a nested value with tensors on the CPU and numpy turned into torch and Python."""
    if isinstance(value, Tensor):
        tensor = value.as_tensor() if hasattr(value, "as_tensor") else value
        return tensor.detach().cpu().clone()
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Counter):
        return Counter({key: int(count) for key, count in value.items()})
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{k}]") for k, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only tensors and plain values"
    )


def _load_weights(network: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    """Load all weights or none, and say briefly how another network's differ."""
    own = network.state_dict()
    missing, unexpected = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shapes = {
        key: (tuple(weights[key].shape), tuple(own[key].shape))
        for key in own
        if isinstance(own[key], Tensor)
        and isinstance(weights.get(key), Tensor)
        and weights[key].shape != own[key].shape
    }
    _require_one_dimension(type(network).__name__, shapes, path)
    if missing or unexpected or shapes:
        differing = [f"{key} {found} instead of {wanted}" for key, (found, wanted) in shapes.items()]
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": differing}
        raise CheckpointError(
            f"{path} is not a checkpoint of this {type(network).__name__} ({len(own)} entries): "
            + "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in parts.items() if keys)
        )
    network.load_state_dict(OrderedDict(weights))


def _require_one_dimension(name: str, shapes: Mapping[str, tuple[tuple[int, ...], ...]], path: Path) -> None:
    """Say it plainly when weights for slices meet a network for volumes, or the other way round."""
    axes = {(len(found), len(wanted)) for found, wanted in shapes.values()}
    for here, there, scans in ((2, 3, "volumes"), (3, 2, "slices")):
        if (here + 2, there + 2) in axes:  # of convolutions
            raise CheckpointError(
                f"{path} has weights for {here}-D, but this {name} is for {there}-D: expected weights for "
                f"{scans}. Choose a bundle that ships some, or another checkpoint"
            )


def _some(keys: list[str], most: int = 4) -> str:
    more = f", and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def _restore(target: Any, state: Any, path: Path) -> None:
    target = unwrap(target)
    if isinstance(target, nn.Module):
        _load_weights(target, state, path)
        return
    if isinstance(target, LRScheduler):
        _warn_of_another_schedule(target, state, path)
    target.load_state_dict(state)


def _warn_of_another_schedule(target: LRScheduler, state: Mapping[str, Any], path: Path) -> None:
    """``max_epochs`` often sets a schedule's length, which a checkpoint brings along and a longer run cannot change."""
    own = target.state_dict()
    constant = [k for k in own if k in state and not k.startswith("_") and k not in ("last_epoch", "base_lrs")]
    other = [f"{k} {state[k]} instead of {own[k]}" for k in constant if state[k] != own[k]]
    if other:
        warnings.warn(f"{path}: its learning rate schedule goes on, which has {', '.join(other)}", stacklevel=5)


def _require_learning(objects: Mapping[str, Any], path: Path, limit: int | None) -> None:
    optimizers = [item for item in objects.values() if isinstance(item, Optimizer)]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    if rates and not any(rates):
        raise CheckpointError(
            f"{path} has a learning rate of 0, its schedule is at an end: going on to max_epochs {limit} would change "
            "nothing. Start a new run of that length"
        )


def _random_state() -> dict[str, Any]:
    """This process's generators: torch on the CPU and every CUDA device, numpy, Python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": gauss,
        },
        "python": {"version": version, "internal": torch.tensor(internal), "gauss": gauss_next},
    }


def _all_random_states() -> list[dict[str, Any]]:
    return gather_objects(_random_state())


def _restore_random(states: list[dict[str, Any]]) -> None:
    if rank() >= len(states):
        warnings.warn(f"the checkpoint has random states of {len(states)} ranks, none for rank {rank()}", stacklevel=3)
        return
    state = states[rank()]
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))  # noqa: NPY002
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"].tolist()), python["gauss"]))


def _at_start(trainer: Engine, content: Mapping[str, Any]) -> None:
    """When the trainer starts: the gradient scaler, which MONAI's trainer makes only then, and the random states."""

    def restore(engine: Engine) -> None:
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and content["scaler_of_trainer"] is not None:
            scaler.load_state_dict(content["scaler_of_trainer"])
        _restore_random(content["rng"])
        engine.remove_event_handler(restore, Events.STARTED)

    trainer.add_event_handler(Events.STARTED, restore)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
