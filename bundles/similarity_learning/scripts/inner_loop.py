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
"""Fit q(v) to a batch of pairs by stochastic gradients, the similarity being given."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.engines import NonFiniteLossError
from common.handlers.output import is_first_rank
from common.losses.checks import plain
from common.networks import RegistrationNetwork

from .levels import Level, axis_factors, carried, check_levels, coarser, lattice_values, schedule
from .posterior import LowRankGaussian
from .variational import Energies, VariationalProblem

__all__ = ["Fit", "InnerLoop", "frozen"]

logger = logging.getLogger(__name__)

_WINDOW = 25  # iterations whose mean energy is compared with that of the next as many


class Fit(NamedTuple):
    """What an inner loop found.

    Attributes:
        posterior: on the lattice of the full resolution.
        trace: (iterations, 4, B), the columns of :class:`~.variational.Energies` at every iteration of all levels.
        counts: iterations run at each level; those of the full resolution are last.
    """

    posterior: LowRankGaussian
    trace: Tensor
    counts: tuple[int, ...]

    @property
    def energies(self) -> Energies:
        """The last window's mean of each energy, (B,) each."""
        return Energies(*self.trace[-min(_WINDOW, max(1, self.counts[-1])) :].mean(0))


class InnerLoop:
    """Adam on mean, variances and factors of q(v), which starts anew at each visit of a batch.

    The similarity's weights stay as they are; the fixed images are encoded once a level. A pair that begins from
    nothing may begin on coarser images (``levels``), whose iterations cost a fraction and move it further, or at the
    velocity that a network predicts (``start``), or both. A distribution that is given is fitted on, at full
    resolution.

    Args:
        iterations: of a distribution that is given, or, if ``level_iterations`` is not, of all levels together.
        learning_rate: of Adam, voxels of the level an iteration.
        levels: reduction factors of the images, falling to 1: (4, 2, 1) begins at a quarter of the resolution.
        level_iterations: how many at each level; equal shares of ``iterations`` if not given.
        start: a registration network that gives "velocity"; in evaluation mode, on the device of the images.
        rank: factors of a distribution that is started.
        sigma: its standard deviations in voxels; None takes those at which it would rest without images, so that no
            iterations are spent on getting there (see :meth:`~.variational.VariationalProblem.resting_sigma`).
        factor: height of its factors in voxels.
        tolerance: end a level early when the mean energy of a window of 25 iterations falls by no more than this
            fraction against that of the window before, in all images; None never does.
        progress: show a bar with the energies on a terminal, and a line a minute elsewhere.

    Raises:
        ValueError: when a number is out of range, or the levels do not fall to 1.
    """

    def __init__(
        self,
        iterations: int = 1024,
        learning_rate: float = 0.01,
        levels: Sequence[int] = (1,),
        level_iterations: Sequence[int] | None = None,
        start: RegistrationNetwork | None = None,
        tolerance: float | None = None,
        progress: bool = False,
        *,
        rank: int = 1,
        sigma: float | None = 0.5,
        factor: float = 0.1,
    ) -> None:
        self.levels = check_levels(levels)
        shares = tuple(level_iterations) if level_iterations is not None else (1,) * len(self.levels)
        if len(shares) != len(self.levels) or min(shares) < 0 or sum(shares) == 0:
            raise ValueError(f"level_iterations must be one number for each of {self.levels}, got {level_iterations}")
        if iterations < 1 or learning_rate <= 0:
            raise ValueError(f"iterations and learning_rate must be positive, got {iterations} and {learning_rate}")
        if tolerance is not None and tolerance < 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance}")
        self.iterations, self.learning_rate, self.shares = iterations, learning_rate, shares
        self.total = iterations if level_iterations is None else sum(shares)
        self.start, self.tolerance, self.progress = start, tolerance, progress
        self.rank, self.sigma, self.factor = rank, sigma, factor

    def initial(self, problem: VariationalProblem, moving: Tensor, fixed: Tensor, level: int = 1) -> LowRankGaussian:
        """What a pair begins from: no motion, or the network's, with the variances of the settings.

        Args:
            problem: says what the parameters are.
            moving: (B, 1, *S), at full resolution.
            fixed: (1 or B, 1, *S).
            level: the reduction factor of the images that it is for.
        """
        factors, dims = axis_factors(moving.shape[2:], level), moving.ndim - 2
        size = tuple(-(-n // f) for n, f in zip(moving.shape[2:], factors, strict=True))
        if self.start is None:
            mean = moving.new_zeros((len(moving), dims, *problem.transformation.lattice(size)), dtype=torch.float32)
        else:
            mean = lattice_values(problem.transformation, self._predicted(moving, fixed), factors)
        sigma = problem.resting_sigma(dims) if self.sigma is None else self.sigma
        return LowRankGaussian.initial(len(moving), mean.shape[2:], dims, self.rank, sigma, self.factor, mean)

    def fit(
        self,
        problem: VariationalProblem,
        moving: Tensor,
        fixed: Tensor,
        mask: Tensor | None = None,
        posterior: LowRankGaussian | None = None,
        generator: torch.Generator | None = None,
        iterations: int | None = None,
    ) -> Fit:
        """Fit q(v) to pairs; images of a batch do not influence each other.

        Args:
            problem: the energies, on the device of the images.
            moving: (B, 1, *S) in [0, 1].
            fixed: (1 or B, 1, *S) in [0, 1].
            mask: (1 or B, 1, *S), voxels of the fixed images that count; None for all.
            posterior: to go on from, in place and without coarse levels; a new one if not given.
            generator: where the random numbers come from.
            iterations: instead of the number in the settings; levels get shares of it in the same proportions.

        Returns:
            the distribution and the energies on the way. The trace has random samples' energies, not means.

        Raises:
            ValueError: when the shapes of images, mask or distribution disagree.
            NonFiniteLossError: when an energy is no number.
        """
        _check(moving, fixed, mask)
        # Callers may have switched gradients off, or made the images in inference mode.
        with torch.inference_mode(False), torch.enable_grad(), frozen(problem.similarity):
            moving, fixed = (_ordinary(image) for image in (moving, fixed))
            mask = None if mask is None else _ordinary(mask).bool()
            if posterior is None:
                return self._from_nothing(problem, moving, fixed, mask, generator, iterations)
            posterior.to(moving.device)
            images = Level((1,) * (moving.ndim - 2), moving, fixed, mask)
            count = self.iterations if iterations is None else iterations
            trace = self._descend(problem, posterior, images, generator, count)
        return Fit(posterior, trace, (len(trace),))

    def _from_nothing(
        self,
        problem: VariationalProblem,
        moving: Tensor,
        fixed: Tensor,
        mask: Tensor | None,
        generator: torch.Generator | None,
        iterations: int | None,
    ) -> Fit:
        total = self.total if iterations is None else iterations
        posterior, last, traces = None, (1,) * (moving.ndim - 2), []
        for level, count in zip(self.levels, schedule(total, self.shares), strict=True):
            images = coarser(moving, fixed, mask, level)
            if posterior is None:
                posterior = self.initial(problem, moving, fixed, level)
            elif images.factors != last:
                relative = [old / new for old, new in zip(last, images.factors, strict=True)]
                posterior = carried(problem, posterior, relative, images.moving.shape[2:])
            last = images.factors
            traces.append(self._descend(problem, posterior, images, generator, count))
        assert posterior is not None
        return Fit(posterior, torch.cat(traces), tuple(len(trace) for trace in traces))

    def _descend(
        self,
        problem: VariationalProblem,
        posterior: LowRankGaussian,
        images: Level,
        generator: torch.Generator | None,
        count: int,
    ) -> Tensor:
        """Run up to ``count`` iterations at one level; the energies (iterations, 4, B)."""
        optimizer = _adam(posterior, self.learning_rate)
        with torch.no_grad():
            reference = problem.similarity.reference(images.fixed, images.mask)
        trace: list[Tensor] = []
        title = f"q(v) 1/{max(images.factors)}" if max(images.factors) > 1 else "q(v)"
        with _Progress(title, count, self.progress) as progress, _finite(trace):
            for _ in range(count):
                optimizer.zero_grad(set_to_none=True)
                energies = problem.energies(posterior, images.moving, reference, generator=generator)
                energies.loss.sum().backward()
                optimizer.step()
                trace.append(torch.stack([energy.detach() for energy in energies]))
                progress.step(trace)
                if self.tolerance is not None and _settled(trace, self.tolerance):
                    break
        return torch.stack(trace) if trace else images.moving.new_zeros((0, 4, len(images.moving)))

    def _predicted(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The starting network's velocity, (B, d, *S) in voxels."""
        assert self.start is not None
        network = self.start.to(moving.device)
        was_training = network.training
        network.eval()
        with torch.no_grad():
            found = network.fields(torch.cat((moving, fixed.expand_as(moving)), dim=1))
        network.train(was_training)
        if "velocity" not in found:
            raise ValueError(
                f"start must be a network that gives 'velocity'; {type(network).__name__} gives {[*found]}"
            )
        return found["velocity"].float()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's parameters, and evaluation mode; as before afterwards."""
    flags, modes = [(p, p.requires_grad) for p in module.parameters()], [(m, m.training) for m in module.modules()]
    try:
        module.requires_grad_(False).eval()
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode


def _adam(posterior: LowRankGaussian, learning_rate: float) -> torch.optim.Adam:
    """One pass over each tensor where the device can, instead of about ten."""
    fused = posterior.mean.device.type in ("cpu", "cuda", "mps")
    return torch.optim.Adam(posterior.parameters(), lr=learning_rate, fused=fused)


def _ordinary(tensor: Tensor) -> Tensor:
    """A plain tensor that may be kept for a backward pass; those made in inference mode may not."""
    tensor = plain(tensor)
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check(moving: Tensor, fixed: Tensor, mask: Tensor | None) -> None:
    """Refuse images of several channels or of different sizes, and masks that fit no fixed image."""
    named = {"moving": moving, "fixed": fixed, **({} if mask is None else {"mask": mask})}
    shapes = {name: tuple(image.shape) for name, image in named.items()}
    for name, shape in shapes.items():
        if len(shape) not in (4, 5) or shape[1] != 1 or shape[2:] != shapes["moving"][2:]:
            raise ValueError(f"{name} must be (B, 1, *S) with the size of moving, got {shapes}")
        if shape[0] not in (1, shapes["moving"][0]) or (name == "mask" and shape[0] not in (1, shapes["fixed"][0])):
            raise ValueError(f"there must be 1 {name} or one for each moving image (a mask: fixed image), got {shapes}")


def _settled(trace: list[Tensor], tolerance: float) -> bool:
    """Whether the energies have stopped to fall; looks once in every window."""
    if len(trace) % _WINDOW or len(trace) < 2 * _WINDOW:
        return False
    windows = torch.stack([losses[3] for losses in trace[-2 * _WINDOW :]]).unflatten(0, (2, _WINDOW))
    before, now = windows.mean(1)
    return bool((before - now <= tolerance * now.abs()).all())


@contextmanager
def _finite(trace: list[Tensor]) -> Iterator[None]:
    """Say in which iteration what was no number first, and of which image.

    Looks at the end, as looking waits for the device, or when a factorisation has failed over it.
    """
    failure: Exception | None = None
    try:
        yield
    except torch.linalg.LinAlgError as error:
        failure = error
    bad = (~torch.isfinite(torch.stack(trace))).nonzero().tolist() if trace else []
    advice = "Look at this scan, or lower the learning rate of q(v)"
    if bad:
        (iteration, energy, image), name = bad[0], Energies._fields[bad[0][1]]
        raise NonFiniteLossError(
            f"iteration {iteration} of q(v): the energy '{name}' of image {image} of the batch is "
            f"{float(trace[iteration][energy, image])}. {advice}"
        ) from failure
    if failure is not None:
        raise NonFiniteLossError(f"iteration {len(trace)} of q(v): its covariance is none. {advice}") from failure


class _Progress:
    """A bar on a terminal, else sparse lines, with the batch's mean energies; silent unless asked for."""

    def __init__(self, title: str, count: int, shown: bool) -> None:
        shown = shown and is_first_rank()
        terminal = shown and sys.stderr.isatty()
        self._title, self._count = title, count
        self._bar = tqdm(total=count, desc=title, leave=False, dynamic_ncols=True) if terminal else None
        self._pause = (0.5 if terminal else 60.0) if shown else float("inf")
        self._shown = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, trace: list[Tensor]) -> None:
        """One iteration more; reads the energies, which waits for the device, now and then only."""
        if self._bar is not None:
            self._bar.update()
        if time.monotonic() - self._shown < self._pause:
            return
        self._shown = time.monotonic()
        means = torch.stack(trace[-_WINDOW:]).mean((0, 2)).tolist()
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in zip(Energies._fields, means, strict=True))
        if self._bar is not None:
            self._bar.set_postfix_str(numbers)
        else:
            logger.info("%s %d/%d: %s", self._title, len(trace), self._count, numbers)
