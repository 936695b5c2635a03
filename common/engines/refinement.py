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
"""Instance optimisation: what a network found for a pair is the start, and the pair itself says how to go on."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.engines.pair_objective import FIELDS, PairObjective
from common.engines.spline_flow import SplineFlow
from common.handlers.output import is_first_rank
from common.losses import WeightedLosses
from common.losses.checks import full_precision

__all__ = ["Refined", "Refinement"]

logger = logging.getLogger(__name__)

_SEEN = ("moving", "fixed", "moving_mask", "fixed_mask", "moving_affine", "fixed_affine")
_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Refined:
    """What came of it.

    Attributes:
        fields: ``ddf`` and, where the network gave one, ``inverse_ddf``, with what else is still true of them.
        iterations: that were made at all resolutions, the mean over the pairs of the batch.
        loss_before: of the network's field at full resolution, the mean over the pairs.
        loss_after: of the refined field, likewise; never above that before.
        seconds: it took, for all pairs.
    """

    fields: dict[str, Any]
    iterations: float
    loss_before: float
    loss_after: float
    seconds: float

    def numbers(self) -> dict[str, float]:
        """All but the fields, for tables and reports."""
        names = ("iterations", "loss_before", "loss_after", "seconds")
        return {name: getattr(self, name) for name in names}


class Refinement:
    """Continue from a network's field on one pair by descent on a loss of that pair.

    The result is ``phi(exp(v)(x))`` with the network's map ``phi``, and the other way ``exp(-v)(phi^-1(y))`` where the
    network gives an inverse. The velocity ``v`` is a cubic B-spline of control points that start at 0 (Rueckert et al.,
    IEEE TMI 1999; Arsigny et al., MICCAI 2006) and are moved by Adam. Because ``exp(v)`` has an inverse, the result has
    one if ``phi`` has. What interpolation folds nevertheless, beyond what ``phi`` folded, is taken back at that place
    until the folded volume of either field is no more than it was.

    An image of 2**20 voxels or more is refined at half its resolution first (along axes of at least 64 voxels), with
    the same control points and an eighth of the work, and then as it is. Of N iterations, ``fine`` N, rounded up, are
    for the full resolution and those before for the half one; either search may end before that. What it came to is
    judged at full resolution alone. All iterations on a smaller image are at full resolution.

    Every pair is optimised by itself, with no label map in sight. Fields and losses are float32, whatever autocast
    says. On the CPU the result is the same every time; CUDA adds gradients up in any order.

    Args:
        loss: named terms as for training, of the values ``moved``, ``fixed``, ``ddf``, ``inverse_moved``,
            ``inverse_ddf``, ``moving_mask`` and so on (:class:`common.engines.PairValues`) and of the fields in
            ``keep``. Default: LNCC of window 9 and the diffusion energy of the field with weight 1, within the masks
            that the batch has, averaged over both directions where the network gives both. At half resolution windows
            span as many of the larger voxels.
        spacing: voxels between control points. With 1 there is no half resolution.
        learning_rate: Adam's, in voxels: how far a control point goes in one of the first steps. Half of it at full
            resolution, if the half resolution came before.
        steps: squarings of ``exp(v)``.
        patience: iterations after which the loss must have improved, or the search at this resolution ends.
        tolerance: by which fraction of its absolute value it must have.
        fine: share of the iterations on a large image that is kept for the full resolution; 1 for no other.
        keep: outputs of the network that hold whatever the field is: they say something of the fixed image and not of
            the motion. All others, such as a velocity, the levels of a pyramid or samples, belong to the field that was
            replaced and are dropped.
        stacks: images are stacks (X, Y, Z) whose slices are registered one by one, in the plane.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        loss: WeightedLosses | None = None,
        *,
        spacing: int = 3,
        learning_rate: float = 0.5,
        steps: int = 4,
        patience: int = 10,
        tolerance: float = 5e-3,
        fine: float = 0.3,
        keep: Sequence[str] = ("weight_map", "alpha", "sigma", "w"),
        stacks: bool = False,
    ) -> None:
        for name, value, least in (("spacing", spacing, 1), ("steps", steps, 0), ("patience", patience, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Refinement: {name} must be a whole number of at least {least}, got {value!r}")
        for name, number in (("learning_rate", learning_rate), ("tolerance", tolerance)):
            if not math.isfinite(number) or number < 0 or (number == 0 and name == "learning_rate"):
                raise ValueError(f"Refinement: {name} must be a positive number, got {number!r}")
        if not 0 <= fine <= 1:
            raise ValueError(f"Refinement: fine must be a share from 0 to 1, got {fine!r}")
        self.loss, self.spacing, self.learning_rate, self.steps = loss, spacing, learning_rate, steps
        self.patience, self.tolerance, self.fine = patience, tolerance, fine
        self.keep, self.stacks = tuple(keep), stacks

    def __call__(self, fields: Mapping[str, Any], batch: Mapping[str, Any], iterations: int) -> Refined:
        """Refine the fields of a batch of pairs.

        Args:
            fields: the network's; ``ddf`` (B, d, *S), ``inverse_ddf`` where it gives one.
            batch: ``moving`` and ``fixed`` (B, C, *S), ``moving_mask`` and ``fixed_mask`` (B, 1, *S) if there are any.
            iterations: the most to make.

        Returns:
            the refined fields, detached, with how it went.

        Raises:
            NonFiniteLossError: when the loss of the network's field is no number.
            KeyError: when a term of the loss needs what is not there; it names both.
        """
        start = time.perf_counter()
        known = {name: fields[name] for name in (*FIELDS, *self.keep) if name in fields}
        values = {name: batch[name] for name in _SEEN if name in batch} | known
        device = values["ddf"].device
        # Whatever the caller has switched off, half precision and gradients, is switched for this only.
        with torch.inference_mode(False), torch.enable_grad(), full_precision(device):
            found = [self._one(_item(values, number), iterations) for number in range(len(values["ddf"]))]
        fields = known | {name: torch.cat([one.fields[name] for one in found]) for name in found[0].fields}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        iterations_made, before, after = (sum(values) / len(found) for values in list(zip(*found, strict=True))[1:])
        return Refined(fields, iterations_made, before, after, time.perf_counter() - start)

    def _one(self, values: dict[str, Any], iterations: int) -> _Outcome:
        """Refine one pair."""
        values = _slices(values) if self.stacks else values
        pair = PairObjective(values, self.loss, SplineFlow(values["ddf"].shape[2:], self.spacing, self.steps))
        shown = _Progress(iterations)
        points, left = self._descend_roughly(pair, iterations, shown)
        # What was found at half resolution is nearly right, and long steps would lose it again.
        rate = self.learning_rate / 2 if bool(points.any()) else self.learning_rate
        points = self._descend(pair, points, left, rate, shown, "full resolution")
        with torch.no_grad():
            fields = pair.unfolded(points)
            after = float(pair.loss_of(fields))
        # Folds that are taken back cost a little, which may be all that was gained.
        if not after < pair.before:
            fields, after = pair.start, pair.before
        shown.close(pair.before, after)
        fields = {name: _stacked(field) if self.stacks else field for name, field in fields.items()}
        return _Outcome(fields, shown.made, pair.before, after)

    def _descend_roughly(self, pair: PairObjective, iterations: int, shown: _Progress) -> tuple[Tensor, int]:
        """What half the resolution comes to, and how many iterations are for the full one."""
        points, rough = pair.control_points(), pair.coarser()
        left = math.ceil(round(self.fine * iterations, 6))
        if rough is None or left == iterations:
            return points, iterations
        found = self._descend(rough, points, iterations - left, self.learning_rate, shown, "half resolution")
        with torch.no_grad():
            # What helps there may do harm here.
            return found if float(pair.loss(found)) < pair.before else points, left

    def _descend(
        self, pair: PairObjective, points: Tensor, iterations: int, rate: float, shown: _Progress, resolution: str
    ) -> Tensor:
        """The control points of the lowest loss that Adam comes by, with its learning rate in voxels."""
        best = points
        points = points.clone().requires_grad_()
        optimizer = torch.optim.Adam([points], lr=rate / self.spacing)
        losses: list[float] = []
        while True:
            total = pair.loss(points)
            losses.append(float(total.detach()))
            if losses[-1] <= min(losses):
                best = points.detach().clone()
            shown(losses, resolution)
            if len(losses) > iterations or not math.isfinite(losses[-1]) or self._flat(losses):
                return best
            optimizer.zero_grad()
            total.backward()
            optimizer.step()

    def _flat(self, losses: list[float]) -> bool:
        """Whether the last iterations were not worth their while."""
        if len(losses) <= self.patience:
            return False
        earlier, now = min(losses[: -self.patience]), min(losses)
        return earlier - now <= self.tolerance * abs(now)


class _Outcome(NamedTuple):
    """Of one pair."""

    fields: dict[str, Tensor]
    iterations: int
    loss_before: float
    loss_after: float


class _Progress:
    """A bar on a terminal; elsewhere a line now and then, and one at the end."""

    def __init__(self, iterations: int) -> None:
        self.iterations, self.made, self.written = iterations, 0, time.monotonic()
        self.bar = tqdm(
            total=iterations,
            desc="refine",
            leave=False,
            dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and is_first_rank()),
        )

    def __call__(self, losses: list[float], resolution: str) -> None:
        """One more loss at a resolution; the first is that of the start."""
        course = f"{resolution}, {_course(losses[0], min(losses))}"
        if len(losses) > 1:
            self.made += 1
            self.bar.set_postfix_str(course, refresh=False)
            self.bar.update()
        if self.bar.disable and time.monotonic() - self.written >= _LINE_SECONDS:
            self._write(course)

    def close(self, before: float, after: float) -> None:
        """The end, with losses at full resolution."""
        self.bar.close()
        self._write(_course(before, after))

    def _write(self, course: str) -> None:
        self.written = time.monotonic()
        logger.info("refine %d/%d: %s", self.made, self.iterations, course)


def _course(before: float, after: float) -> str:
    return f"loss {before:.4g} -> {after:.4g}"


def _item(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One pair of a batch."""
    return {n: v[number : number + 1] if isinstance(v, Tensor) else v for n, v in values.items()}


def _slices(values: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of stacks (1, C, X, Y, Z) as slices (Z, C, X, Y); a field loses its last component, which is 0."""
    flat = {n: v[0].movedim(-1, 0) if isinstance(v, Tensor) and v.dim() == 5 else v for n, v in values.items()}
    return {n: v[:, :-1] if n in FIELDS else v for n, v in flat.items()}


def _stacked(field: Tensor) -> Tensor:
    """A batch of fields (Z, 2, X, Y) as that of a stack, (1, 3, X, Y, Z)."""
    whole = torch.cat([field, torch.zeros_like(field[:, :1])], dim=1)
    return whole.movedim(0, -1)[None]
