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
"""The evaluation engine of every bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import Inferer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.engines.network import autocast
from common.engines.trainer import prepare_pair
from common.engines.values import PairValues
from common.handlers import attach_handlers
from common.metrics import MetricCollection

__all__ = ["RegistrationEvaluator"]


class RegistrationEvaluator(SupervisedEvaluator):
    """Register pairs and measure them.

    ``metrics`` names each measure, with the values it takes (``common.engines.PairValues`` lists them):
    ``{"dice": {"metric": DiceScore(labels=[1, 2]), "inputs": ["moved_label", "fixed_label"]}}``. The same metric on
    ``moving_label`` gives the value before registration. ``state.output["metrics"]`` holds the values of the batch,
    (B, K) each; ``state.metrics`` the means over all pairs of all processes. To what the network gives, the engine adds
    ``seconds`` (B, 1), the wall time of its forward pass for a pair.

    Args:
        device: where to run.
        val_data_loader: gives dictionaries with ``moving`` and ``fixed`` (B, C, *S).
        network: from ``common.engines.distribute``, or any module that maps (B, 2C, *S) to a dictionary with ``ddf``.
        metrics: the measures by name.
        key_val_metric: the name whose best value is remembered; None for none.
        lower_is_better: whether a smaller key metric is better.
        labels: foreground labels, for values on one-hot labels.
        amp: as for the trainer.
        inferer: how the network is called.
        val_handlers: Ignite handlers; None entries are dropped.
        prepare_batch: moves a batch to the device and stacks the pair.
        kwargs: passed to MONAI's ``SupervisedEvaluator``.

    Raises:
        ValueError: when the key metric is not among the metrics.
    """

    def __init__(
        self,
        device: torch.device | str,
        val_data_loader: Iterable[Any],
        network: nn.Module,
        metrics: MetricCollection | Mapping[str, Mapping[str, Any]] | None = None,
        key_val_metric: str | None = None,
        lower_is_better: bool = False,
        labels: Sequence[int] = (),
        amp: bool | str = False,
        inferer: Inferer | None = None,
        val_handlers: Sequence[Any] | None = None,
        prepare_batch: Callable[..., Any] = prepare_pair,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            device=torch.device(device),
            val_data_loader=val_data_loader,
            network=_alone(network),
            inferer=inferer,
            prepare_batch=prepare_batch,
            decollate=False,
            **kwargs,
        )
        self.metrics = metrics if isinstance(metrics, MetricCollection) else MetricCollection(metrics or {})
        if key_val_metric is not None and key_val_metric not in self.metrics.metrics:
            raise ValueError(f"key metric '{key_val_metric}' is not among the metrics {sorted(self.metrics.metrics)}")
        self.state.key_metric_name = key_val_metric
        self.lower_is_better = lower_is_better
        self.labels = labels
        self.precision = amp
        self.add_event_handler(Events.EPOCH_STARTED, self.metrics.reset)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._aggregate)
        attach_handlers(self, val_handlers)

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        image, batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        with self.mode(self.network), torch.no_grad():
            start = _now(image.device)
            with autocast(self.state.device, self.precision):
                fields = self.inferer(image, self.network)
            taken = (_now(image.device) - start) / len(image)
            fields = self._continued(fields, batch)
            values = PairValues(batch, {**fields, "seconds": image.new_full((len(image), 1), taken)}, self.labels)
            measured = self.metrics(values)
            _ = values["moved"]  # pictures and writers want it, whatever was measured
        output = values.known()
        output["metrics"] = measured
        self.state.output = output
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return output

    def _continued(self, fields: dict[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
        """What becomes of the network's fields before anything is measured; a subclass may go on from them."""
        return fields

    def _aggregate(self) -> None:
        """Average over all pairs, and remember the best value of the key metric."""
        self.state.metrics.update(self.metrics.aggregate())
        key = self.state.key_metric_name
        if key is None:
            return
        current, best = self.state.metrics[key], self.state.best_metric
        better = current < best if self.lower_is_better else current > best
        if self.state.best_metric_epoch == -1 or better:
            self.state.best_metric, self.state.best_metric_epoch = current, self.state.epoch


def _alone(network: nn.Module) -> nn.Module:
    """The network without gradient synchronisation.

    That also sends buffers around in every forward pass, for which ranks with fewer pairs would not be there.
    """
    return network.module if isinstance(network, DistributedDataParallel) else network


def _now(device: torch.device) -> float:
    """The wall clock, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
