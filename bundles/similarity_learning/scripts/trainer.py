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
"""Train a similarity: register the pairs of a batch with it as it is, then improve it by what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.utils import IterationEvents
from torch import Tensor
from torch.optim import Optimizer

from common.engines import NonFiniteLossError, PairValues, autocast, prepare_pair
from common.engines.trainer import require_finite, set_epoch
from common.handlers import attach_handlers
from common.spatial import warp

from .contrastive import ContrastiveObjective, set_trainable
from .distributed import average_gradients, share_weights
from .image_posterior import ImageGaussian
from .inner_loop import InnerLoop
from .posterior import LowRankGaussian
from .store import Pair, PosteriorStore
from .variational import Energies, VariationalProblem

__all__ = ["SimilarityTrainer"]

_SAME = 1e-5  # how far two copies of the atlas may be apart, of intensities in [0, 1]
_ADVICE = "lower the learning rates of the network and of q_f"


class SimilarityTrainer(Trainer):
    """Alternate between the q(v) of a batch of pairs and one step of the similarity's network and of q_f.

    Every iteration takes what the store knows of its pairs, runs the inner loop from there (or from its own start for
    pairs that are new), stores the result, and makes ``network_steps`` contrastive steps with a sample of it. All fixed
    images are one atlas. The number of pairs may differ from batch to batch.

    On several processes (torchrun) each registers pairs of its own; gradients of the network and of q_f are averaged,
    and the store is shared at the end of every epoch. Hand ``similarity`` (or a network that holds it),
    ``image_posterior``, both optimizers and the store to ``common.handlers.SafeCheckpoint``: a run that is resumed then
    gives the numbers of one that was not interrupted.

    ``state.output`` has ``loss`` (of the network), ``losses`` (``q_v`` with its parts ``data``, ``regularisation`` and
    ``entropy``, means over the batch of the last inner iteration; then the parts of the objective), and the batch with
    ``ddf`` and ``moved`` of the mean velocity, without noise.

    Args:
        device: where to train.
        max_epochs: epochs to run.
        train_data_loader: gives dictionaries with ``moving`` and ``fixed`` (B, 1, *S), ``moving_id`` and ``fixed_id``
            (unless nothing is stored), and perhaps ``fixed_mask``.
        problem: its similarity is what is trained.
        inner_loop: how q(v) is found.
        image_posterior: q_f, of the atlas.
        optimizer: over the similarity's parameters.
        image_optimizer: over those of q_f.
        objective: of network and q_f; the published one by default.
        store: of q(v); in memory by default.
        iterations: of the inner loop for a pair that the store knows; the loop's own number by default.
        first_iterations: for a pair that it does not know; the loop's own number by default.
        network_steps: contrastive steps a batch, each with samples of its own.
        labels: foreground labels, for metrics of the output.
        amp: run the similarity's network in half precision: False, or True or "bf16".
        epoch_length: iterations an epoch; the loader's length by default.
        train_handlers: Ignite handlers with ``attach``; None entries are dropped.
        prepare_batch: moves a batch to the device.
        kwargs: passed to MONAI's ``Workflow``.

    Raises:
        ValueError: when the similarity has nothing to learn, ``network_steps`` is below 1, or ``amp`` is another one.
    """

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable[Any],
        problem: VariationalProblem,
        inner_loop: InnerLoop,
        image_posterior: ImageGaussian,
        optimizer: Optimizer,
        image_optimizer: Optimizer,
        objective: ContrastiveObjective | None = None,
        store: PosteriorStore | None = None,
        iterations: int | None = None,
        first_iterations: int | None = None,
        network_steps: int = 1,
        labels: Sequence[int] = (),
        amp: bool | str = False,
        epoch_length: int | None = None,
        train_handlers: Sequence[Any] | None = None,
        prepare_batch: Callable[..., Any] = prepare_pair,
        **kwargs: Any,
    ) -> None:
        _check(problem, network_steps, amp)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            prepare_batch=prepare_batch,
            decollate=False,
            **kwargs,
        )
        self.problem, self.inner_loop = problem.to(device), inner_loop
        self.image_posterior = image_posterior.to(device)
        self.optimizer, self.image_optimizer = optimizer, image_optimizer
        self.objective = ContrastiveObjective() if objective is None else objective
        self.store = PosteriorStore() if store is None else store
        self.iterations, self.first_iterations = iterations, first_iterations
        self.network_steps, self.labels, self.precision = network_steps, labels, amp
        self.add_event_handler(Events.STARTED, lambda: share_weights([problem.similarity, self.image_posterior]))
        self.add_event_handler(Events.EPOCH_STARTED, set_epoch)
        self.add_event_handler(Events.EPOCH_COMPLETED, self.store.synchronise)
        self.add_event_handler(Events.COMPLETED, self.store.tidy)
        # Registered last, so that a handler that resumes sees an engine that is whole.
        attach_handlers(self, train_handlers)

    def _iteration(self, engine: Any, batchdata: Mapping[str, Any]) -> dict[str, Any]:
        _, batch = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        self._require_atlas(batch)
        posterior, energies = self._register(batch)
        with torch.no_grad():
            ddf = self.problem.displacement(posterior.mean, batch["moving"].shape[2:])
        self.fire_event(IterationEvents.FORWARD_COMPLETED)
        for _ in range(self.network_steps):
            terms = self._learn(batch, posterior)
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self._output(batch, ddf, energies, terms)

    def _register(self, batch: Mapping[str, Any]) -> tuple[LowRankGaussian, Energies]:
        """Find q(v) of every pair, from where the last visit left it, and store it."""
        pairs = self._pairs(batch)
        known = [pair in self.store for pair in pairs]
        parts, order = [], []
        for visited, iterations in ((True, self.iterations), (False, self.first_iterations)):
            rows = [row for row, there in enumerate(known) if there is visited]
            if rows:
                start = self.store.get([pairs[row] for row in rows], self.state.device) if visited else None
                parts.append(self._fit(batch, rows, start, iterations))
                order += rows
        back = torch.tensor(order, device=self.state.device).argsort()
        states = [posterior.state() for posterior, _ in parts]
        posterior = LowRankGaussian.from_state({k: torch.cat([s[k] for s in states])[back] for k in states[0]})
        energies = Energies(*(torch.cat(values)[back] for values in zip(*(part[1] for part in parts), strict=True)))
        self.store.put(pairs, posterior)
        return posterior, energies

    def _fit(
        self, batch: Mapping[str, Any], rows: list[int], start: LowRankGaussian | None, iterations: int | None
    ) -> tuple[LowRankGaussian, Energies]:
        moving, fixed, mask = batch["moving"][rows], batch["fixed"][:1], _atlas_mask(batch)
        try:
            with autocast(self.state.device, self.precision):
                fit = self.inner_loop.fit(self.problem, moving, fixed, mask, posterior=start, iterations=iterations)
        except NonFiniteLossError as error:
            who = {key: [batch[key][row] for row in rows] for key in ("moving_id", "fixed_id") if key in batch}
            raise NonFiniteLossError(f"iteration {self.state.iteration}, batch {who or rows}: {error}") from error
        return fit.posterior, fit.energies

    def _learn(self, batch: Mapping[str, Any], posterior: LowRankGaussian) -> dict[str, Tensor]:
        """One contrastive step of the network and of q_f."""
        similarity = self.problem.similarity
        moved = self._moved_three_times(batch["moving"], posterior)
        self.image_posterior.clamp_()
        self.optimizer.zero_grad(set_to_none=True)
        self.image_optimizer.zero_grad(set_to_none=True)
        set_trainable(similarity, True)
        with autocast(self.state.device, self.precision):
            terms = self.objective(similarity, self.image_posterior, moved, _atlas_mask(batch))
        require_finite(terms["loss"], terms, batch, self.state.iteration, _ADVICE)
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        terms["loss"].backward()
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        average_gradients([*similarity.parameters(), *self.image_posterior.parameters()])
        self.optimizer.step()
        self.image_optimizer.step()
        return {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def _moved_three_times(self, moving: Tensor, posterior: LowRankGaussian) -> tuple[Tensor, ...]:
        """Warps by one sample of q(v), which differ in the noise of the field."""
        sample = posterior.mean + posterior.deviation(*posterior.draw())
        ddf = self.problem.displacement(sample, moving.shape[2:])
        return tuple(warp(moving, self.problem.jitter(ddf)) for _ in range(3))

    def _output(
        self, batch: Mapping[str, Any], ddf: Tensor, energies: Energies, terms: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        values = PairValues(batch, {"ddf": ddf, "moved": warp(batch["moving"], ddf)}, self.labels)
        losses = {name: value.mean() for name, value in energies._asdict().items()}
        output = values.known()
        output["loss"] = terms["loss"]
        output["losses"] = {"q_v": losses.pop("loss"), **losses, **_learning(terms)}
        self.state.output = output
        return output

    def _pairs(self, batch: Mapping[str, Any]) -> list[Pair]:
        """The ids by which q(v) is stored."""
        if self.store.where == "none":
            return [("", str(item)) for item in range(len(batch["moving"]))]
        missing = [key for key in ("moving_id", "fixed_id") if key not in batch]
        if missing:
            raise KeyError(f"q(v) is stored by the ids of its pair, but the batch has no {missing}: {sorted(batch)}")
        return list(zip(batch["moving_id"], batch["fixed_id"], strict=True))

    def _require_atlas(self, batch: Mapping[str, Any]) -> None:
        """q_f is of one fixed image only.

        Raises:
            ValueError: when a fixed image is another one.
        """
        atlas, fixed = self.image_posterior.mean, batch["fixed"]
        if atlas.shape[1:] != fixed.shape[1:]:
            raise ValueError(f"the atlas of q_f is {tuple(atlas.shape)}, the fixed images are {tuple(fixed.shape)}")
        difference = (fixed - atlas).abs().flatten(1).amax(1)
        other = (~(difference <= _SAME)).nonzero().flatten().tolist()
        if other:
            who = [batch["fixed_id"][item] if "fixed_id" in batch else item for item in other]
            raise ValueError(
                f"all pairs must have the atlas of q_f as their fixed image, but {who} differ from it by up to "
                f"{float(difference.max()):.3g}: train with pairs of an atlas (strategy 'atlas', atlas_is 'fixed')"
            )


def _atlas_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """(1, 1, *S) bool; it is of the fixed image, which is the same in all pairs."""
    mask = batch.get("fixed_mask")
    return None if mask is None else mask[:1].bool()


def _learning(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The objective's parts, under names that those of q(v) do not have."""
    names = {"entropy": "image_entropy"}
    return {names.get(name, name): value for name, value in terms.items() if name != "loss"}


def _check(problem: VariationalProblem, network_steps: int, amp: bool | str) -> None:
    if not any(True for _ in problem.similarity.parameters()):
        raise ValueError("the similarity has nothing to learn: build it with learnt=True")
    if network_steps < 1:
        raise ValueError(f"network_steps must be at least 1, got {network_steps}")
    if amp not in (False, True, "bf16"):
        raise ValueError(f"amp must be False, True or 'bf16' (energies overflow float16's gradients), got {amp!r}")
