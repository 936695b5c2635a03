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
"""How soon each way of starting q(v) has reached the energy that the published one ends with.

Run ``python -m benchmarks.similarity_starts [--size 128 128] [--similarity ssd]`` for a Markdown table. The published
way is a single level from no motion, for the published number of iterations at the published rate. The others begin on
coarser images, or at the velocity of a VoxelMorph that was trained on other subjects, or both. One pair of the embedded
atlas cohort, without a change of contrast, is registered on one thread.

Two energies are followed at the full resolution: the *loss*, the negative evidence lower bound that is minimised, and
the energy of the mean's field (data and regularisation), which is the registration that one gets. Most of the loss is
what the spread of q(v) costs, so that the balanced standard deviation alone makes it low at once: a start is sooner
where it is in both. Noise in them is small: the loss is averaged over the same few draws for all, with its terms that
are known in expectation. The time that this takes is not counted. The standard deviation at which the regularisation
and the entropy balance is known beforehand (``VariationalProblem.resting_sigma``), so the diagonal of q(v) may begin
with it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import format_table, threads
from bundles.similarity_learning.scripts.network import VariationalRegistration, published_setting
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.similarity import Reference
from bundles.similarity_learning.scripts.variational import Draws, Energies, VariationalProblem
from bundles.similarity_learning.scripts.voxelmorph import PublishedVoxelMorph
from common.data.contrast import make_contrast_pair
from common.handlers import load_checkpoint
from common.spatial import warp

__all__ = ["Start", "measure", "trained_voxelmorph"]

_DRAWS, _EVERY = 6, 8
_TEST_SUBJECT, _TRAINING = 30, range(24)


class Start(NamedTuple):
    """How q(v) begins.

    Attributes:
        name: in words.
        levels: reduction factors of the images.
        iterations: at each; None is the published number at the one level there is.
        balanced: begin with the balanced standard deviation instead of the published one.
        amortised: begin at VoxelMorph's velocity.
    """

    name: str
    levels: tuple[int, ...] = (1,)
    iterations: tuple[int, ...] | None = None
    balanced: bool = False
    amortised: bool = False


PUBLISHED = Start("published")
STARTS = (
    PUBLISHED,
    Start("balanced sigma", balanced=True),
    Start("levels", (4, 2, 1), (300, 200, 200)),
    Start("levels, balanced sigma", (4, 2, 1), (300, 200, 200), balanced=True),
    Start("VoxelMorph", (1,), (400,), amortised=True),
    Start("VoxelMorph, balanced sigma", (1,), (400,), balanced=True, amortised=True),
    Start("VoxelMorph, levels, balanced sigma", (2, 1), (200, 200), balanced=True, amortised=True),
)


class Point(NamedTuple):
    """Where an optimisation is: CPU seconds since it began, the loss, the energy of the mean's field."""

    seconds: float
    loss: float
    energy: float


class WatchedProblem(VariationalProblem):
    """A problem that notes its energies every few iterations at full resolution, off the clock.

    Args:
        problem: whose parts are used.
        size: of the full resolution.
    """

    def __init__(self, problem: VariationalProblem, size: Sequence[int]) -> None:
        super().__init__(
            problem.similarity, problem.transformation, problem.smoothing, problem.regularisation, problem.noise
        )
        self.size = tuple(size)
        self.points: list[Point] = []
        self._started, self._count = time.process_time(), 0

    def energies(
        self,
        posterior: LowRankGaussian,
        moving: Tensor,
        reference: Reference,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
    ) -> Energies:
        """See :class:`VariationalProblem`."""
        if tuple(moving.shape[2:]) == self.size:
            if self._count % _EVERY == 0:
                self.note(posterior, moving, reference)
            self._count += 1
        return super().energies(posterior, moving, reference, draws, generator)

    @torch.no_grad()
    def note(self, posterior: LowRankGaussian, moving: Tensor, reference: Reference) -> None:
        """Add a point."""
        paused = time.process_time()
        generator, total = torch.Generator().manual_seed(0), 0.0
        for _ in range(_DRAWS):
            found = super().energies(posterior, moving, reference, generator=generator)
            total += float(0.5 * (found.data + found.regularisation).sum()) / _DRAWS
        # Of the density at a sample, half the squared distance has a mean of half the number of parameters.
        loss = total - float(posterior.half_log_determinant().sum()) - 0.5 * posterior.mean.numel()
        energy = float(self.mean_energy(posterior, moving, reference).sum())
        self.points.append(Point(paused - self._started, loss, energy))
        self._started += time.process_time() - paused


def trained_voxelmorph(size: Sequence[int], weight: float, steps: int) -> PublishedVoxelMorph:
    """VoxelMorph, trained on the cohort's training subjects with the energies of the mean's field.

    Args:
        size: of the images.
        weight: of the regularisation.
        steps: of Adam.
    """
    torch.manual_seed(0)
    network = PublishedVoxelMorph(len(size))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    subjects = [_pair(size, number)[:2] for number in _TRAINING]
    count = 4 if len(size) == 2 else 2
    for _ in range(steps):
        chosen = torch.randint(len(subjects), (count,)).tolist()
        moving, fixed = (torch.cat([subjects[k][role] for k in chosen]) for role in (0, 1))
        fields = network.fields(torch.cat((moving, fixed), dim=1))
        velocity = fields["velocity"]
        rough = sum((velocity.diff(dim=axis).square().sum() for axis in range(2, velocity.ndim)), torch.zeros(()))
        optimizer.zero_grad()
        (0.5 * (warp(moving, fields["ddf"]) - fixed).square().sum() + 0.5 * weight * rough).div(count).backward()
        optimizer.step()
    return network.eval()


def measure(
    size: Sequence[int] = (128, 128),
    similarity: str = "ssd",
    transformation: str = "svf",
    starts: Sequence[Start] = STARTS,
    checkpoint: str | Path | None = None,
    steps: int = 400,
    **options: Any,
) -> list[dict[str, Any]]:
    """Register one pair from every start.

    Args:
        size: of the images, at least 32 along each axis.
        similarity: "ssd" or "lcc".
        transformation: "svf" or "bspline".
        starts: the first one is what the others are compared with.
        checkpoint: of a VoxelMorph; one is trained if not given.
        steps: of its training.
        options: more of :class:`VariationalRegistration`, such as ``iterations`` of the first start.

    Returns:
        rows of what was measured, iterations, CPU seconds of all of them, both energies at the end, and the seconds
        until each energy was as low as the first start's at its end (NaN if never), with how many times sooner than
        the first start ends that is.
    """
    network: PublishedVoxelMorph | None = None
    if any(start.amortised for start in starts):
        if checkpoint is None:
            network = trained_voxelmorph(size, published_setting(transformation, similarity).weight, steps)
        else:
            network = PublishedVoxelMorph(len(size))
            load_checkpoint(checkpoint, network)
    model = {"similarity": similarity, "transformation": transformation, **options}
    with threads(1):
        paths = [register(start, size, network, model) for start in starts]
    reference = paths[0][-1]
    return [_row(start, path, reference, size) for start, path in zip(starts, paths, strict=True)]


def register(
    start: Start, size: Sequence[int], network: PublishedVoxelMorph | None, model: dict[str, Any]
) -> list[Point]:
    """The points that an optimisation passes, the end included."""
    chosen = dict(model)
    if start.iterations is not None:
        chosen |= {"levels": start.levels, "level_iterations": start.iterations}
    if start.amortised:
        chosen["start"] = network
    registration = VariationalRegistration(len(size), samples=0, **chosen)
    if start.balanced:
        registration.inner_loop.sigma = registration.problem.resting_sigma(len(size))
    moving, fixed, mask = _pair(size, _TEST_SUBJECT)
    watched = WatchedProblem(registration.problem, size)
    generator = torch.Generator().manual_seed(0)
    found = registration.inner_loop.fit(watched, moving, fixed, mask > 0, generator=generator)
    watched.note(found.posterior, moving, registration.similarity.reference(fixed, mask > 0))
    return watched.points


def _row(start: Start, path: Sequence[Point], target: Point, size: Sequence[int]) -> dict[str, Any]:
    to_loss, to_energy = (
        next((point.seconds for point in path if point[k] <= target[k]), float("nan")) for k in (1, 2)
    )
    iterations = " + ".join(f"{n} at 1/{level}" for n, level in zip(start.iterations or (), start.levels, strict=False))
    return {
        "what": start.name,
        "size": "x".join(str(n) for n in size),
        "iterations": iterations or "all at 1/1",
        "cpu_s": path[-1].seconds,
        "loss": path[-1].loss,
        "energy": path[-1].energy,
        "s_to_loss": to_loss,
        "s_to_energy": to_energy,
        "loss_sooner": target.seconds / to_loss if to_loss else float("inf"),
        "energy_sooner": target.seconds / to_energy if to_energy else float("inf"),
    }


def _pair(size: Sequence[int], subject: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moving and fixed image and the fixed mask, (1, 1, *size) each."""
    pair = make_contrast_pair(size, subject=subject, contrast=0.0)
    return pair.moving[None, None].float(), pair.fixed[None, None].float(), pair.fixed_mask[None, None].float()


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--similarity", default="ssd", choices=("ssd", "lcc"))
    parser.add_argument("--transformation", default="svf", choices=("svf", "bspline"))
    parser.add_argument("--checkpoint", type=Path, help="of a VoxelMorph; one is trained if not given")
    parser.add_argument("--steps", type=int, default=400, help="of its training")
    given = parser.parse_args()
    rows = measure(given.size, given.similarity, given.transformation, checkpoint=given.checkpoint, steps=given.steps)
    print(format_table(rows))


if __name__ == "__main__":
    main()
