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
"""The training engine of every bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer, Workflow
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from common.engines.network import autocast
from common.engines.values import PairValues, stack_pair
from common.handlers import attach_handlers
from common.losses import WeightedLosses

__all__ = ["NonFiniteLossError", "RegistrationTrainer", "prepare_pair", "require_finite", "set_epoch"]


class NonFiniteLossError(RuntimeError):
    """A loss term was not finite."""


def prepare_pair(
    batch: Mapping[str, Any], device: torch.device | str | None, non_blocking: bool = False, **kwargs: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Move a batch of pairs to the device.

    Args:
        batch: ``moving`` and ``fixed`` (B, C, *S), with whatever else the dataset gives.
        device: where to.
        non_blocking: overlap the copy with the host.
        kwargs: passed to ``Tensor.to``.

    Returns:
        the network's input (B, 2C, *S) and the whole batch on the device.

    Raises:
        KeyError: when ``moving`` or ``fixed`` is missing.
    """
    missing = [key for key in ("moving", "fixed") if key not in batch]
    if missing:
        raise KeyError(f"a batch of pairs needs 'moving' and 'fixed'; {missing} is missing among {sorted(batch)}")
    moved = {
        key: value.to(device=device, non_blocking=non_blocking, **kwargs) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    return stack_pair(moved), moved


class RegistrationTrainer(SupervisedTrainer):
    """Train a registration network on pairs: predict fields, weigh the named losses, step.

    The network may run in half precision; fields and losses are float32 always. ``state.output`` is a dictionary with
    ``loss`` (the weighted total), ``losses`` (each term unweighted, by name) and the tensors of the last batch.

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: gives dictionaries with ``moving`` and ``fixed`` (B, C, *S).
        network: from ``common.engines.distribute``: maps (B, 2C, *S) to a dictionary of fields.
        optimizer: over the network's parameters.
        loss_function: the named, weighted terms.
        labels: foreground labels, for terms on one-hot labels.
        clip_gradient: clip the norm of all gradients to this, or None.
        amp: False, "bf16", "fp16", or True for bfloat16.
        inferer: how the network is called; MONAI's SimpleInferer by default.
        epoch_length: iterations an epoch; the loader's length by default.
        train_handlers: Ignite handlers with ``attach``; None entries are dropped.
        prepare_batch: moves a batch to the device and stacks the pair.
        kwargs: passed to MONAI's ``SupervisedTrainer``.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        network: nn.Module,
        optimizer: Optimizer,
        loss_function: WeightedLosses,
        labels: Sequence[int] = (),
        clip_gradient: float | None = None,
        amp: bool | str = False,
        inferer: Inferer | None = None,
        epoch_length: int | None = None,
        train_handlers: Sequence[Any] | None = None,
        prepare_batch: Callable[..., Any] = prepare_pair,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            train_data_loader=train_data_loader,
            network=network,
            optimizer=optimizer,
            loss_function=loss_function.to(device),
            epoch_length=epoch_length,
            prepare_batch=prepare_batch,
            inferer=inferer,
            decollate=False,
            optim_set_to_none=True,
            **kwargs,
        )
        self.labels = labels
        self.clip_gradient = clip_gradient
        self.precision = amp
        use_scaler = amp == "fp16" and self.state.device.type == "cuda"
        self.scaler = torch.amp.GradScaler("cuda") if use_scaler else None
        self.add_event_handler(Events.EPOCH_STARTED, set_epoch)
        # Registered last, so that a handler that resumes sees an engine that is whole.
        attach_handlers(self, train_handlers)

    def run(self) -> None:  # type: ignore[override]
        """Train to ``max_epochs``."""
        # MONAI's own trainer would put a new gradient scaler, or none, in the place of ours.
        Workflow.run(self)

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        image, batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.state.device, self.precision):
            fields = self.inferer(image, self.network)
        values = PairValues(batch, fields, self.labels)
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        total, terms = self.loss_function(values)
        require_finite(total, terms, batch, self.state.iteration)
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        self._step(total)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        output = values.known()
        output["loss"] = total.detach()
        output["losses"] = {name: value.detach() for name, value in terms.items()}
        self.state.output = output
        return output

    def _step(self, total: Tensor) -> None:
        """Back-propagate, unscale, clip and step."""
        if self.scaler is not None:
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
        else:
            total.backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        if self.clip_gradient is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            clip_grad_norm_(parameters, self.clip_gradient)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()


def set_epoch(engine: Engine) -> None:
    """Tell the dataset which epoch begins, so that random partners and images follow from (seed, epoch, index)."""
    loader = engine.data_loader  # type: ignore[attr-defined]
    for part in (getattr(loader, "dataset", None), getattr(loader, "sampler", None)):
        tell = getattr(part, "set_epoch", None)
        if tell is not None:
            tell(engine.state.epoch)


def require_finite(
    total: Tensor,
    terms: Mapping[str, Tensor],
    batch: Mapping[str, Any],
    iteration: int,
    advice: str = "lower the learning rate or set clip_gradient",
) -> None:
    """Stop before a bad gradient reaches the weights, and say which term of which subjects it was.

    Args:
        total: the loss.
        terms: what it was added up from, by name.
        batch: what ``moving_id`` and ``fixed_id`` are taken from.
        iteration: the engine's.
        advice: what else to try, besides looking at the scans.

    Raises:
        NonFiniteLossError: when the loss is infinite or NaN.
    """
    if bool(torch.isfinite(total)):
        return
    bad = {name: float(value.detach()) for name, value in terms.items() if not bool(torch.isfinite(value))}
    who = {key: batch[key] for key in ("moving_id", "fixed_id") if key in batch}
    raise NonFiniteLossError(
        f"iteration {iteration}: the loss is {float(total.detach())}; "
        f"terms that are not finite: {bad or 'none, their sum overflows'}; "
        f"subjects: {who or 'not named by the dataset'}. "
        f"Look at these scans, {advice}"
    )
