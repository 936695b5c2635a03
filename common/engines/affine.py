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
"""Affine registration of two scans: centre of mass, rigid, similarity, affine."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.engines.affine_groups import KINDS, generators
from common.engines.affine_objective import SIMILARITIES, Objective
from common.engines.affine_pyramid import Level, levels, prepare
from common.engines.affine_starts import distinct, guesses
from common.engines.quasi_newton import minimise
from common.spatial import few_threads

__all__ = ["AffineResult", "AffineStage", "register_affine"]

logger = logging.getLogger(__name__)

_FOLLOWED = 4  # guesses that are followed up
_TRIAL_STEPS = 8  # on each of them before the best is chosen
_LONGEST, _SHORTEST = 2.0, 0.02  # of a step, in voxels of the level at the corners of the fixed foreground


@dataclass(frozen=True)
class AffineStage:
    """One step of the way.

    Attributes:
        kind: of the map: "centre", "rigid", "similarity" or "affine"; "start" for the best of the first guesses.
        size: of the level's voxels in mm.
        matrix: (d+1, d+1) float64, world of the fixed to world of the moving scan.
        similarity: at the level.
        overlap: part of the fixed foreground that lies in the moving scan.
        evaluations: of the similarity.
        seconds: it took.
    """

    kind: str
    size: float
    matrix: np.ndarray
    similarity: float
    overlap: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class AffineResult:
    """What was found.

    Attributes:
        matrix: (d+1, d+1) float64; takes points of the fixed scan to points of the moving scan, RAS mm.
        before: similarity as the headers place the scans, at the finest level.
        after: similarity under the matrix, at the finest level.
        overlap: part of the fixed foreground that the matrix sends into the moving scan.
        seconds: all of it took.
        stages: in their order.
    """

    matrix: np.ndarray
    before: float
    after: float
    overlap: float
    seconds: float
    stages: tuple[AffineStage, ...]


def register_affine(
    moving: Tensor,
    fixed: Tensor,
    moving_affine: Tensor | np.ndarray,
    fixed_affine: Tensor | np.ndarray,
    *,
    kind: str = "affine",
    similarity: str = "ncc",
    moving_mask: Tensor | None = None,
    fixed_mask: Tensor | None = None,
    finest: float | None = None,
    max_steps: int = 40,
    max_scale: float = 3.0,
    min_overlap: float = 0.1,
    progress: Callable[[AffineStage], None] | None = None,
) -> AffineResult:
    """Find the map that takes points of the fixed scan to where they lie in the moving one.

    First guesses (the headers as they are, the centres of mass laid on each other, the middles of the grids; each with
    a set of rotations) are compared at a coarse level, and the best are followed. From there the map gains freedom
    (rigid, then a common scale, then all) and the levels resolution. The same input gives the same matrix every time.

    Two scans that do not meet in the world are brought together by their centres of mass; a message says so. No map
    mirrors: the determinant is positive, also where one of the headers is flipped by mistake.

    Args:
        moving: (1, 1, *Sm), 2-D or 3-D, any real intensities.
        fixed: (1, 1, *Sf), on the same device; the work is done there.
        moving_affine: (d+1, d+1), voxel to world, RAS mm, of any orientation and spacing.
        fixed_affine: the same of the fixed scan.
        kind: "centre" (the centres of mass, nothing else), "rigid", "similarity" (rigid and one scale) or "affine".
        similarity: "ncc" (correlation, squared: the most accurate and the fastest for one contrast), "mi" (mutual
            information, for different contrasts), "lncc" (local correlation, squared: stands uneven brightness, but
            sees little of a scale near 1) or "mse".
        moving_mask: (1, 1, *Sm); only what is not 0 counts.
        fixed_mask: (1, 1, *Sf); only what is not 0 counts.
        finest: voxel size in mm of the last level. The default bounds the number of voxels, so large scans are not
            looked at in full resolution; a smaller one costs time and gains hundredths of a millimetre.
        max_steps: in each stage.
        max_scale: a map that stretches or shrinks any direction by more is taken to have failed.
        min_overlap: so is one that leaves less of the fixed foreground inside the moving scan.
        progress: called with every stage when it is done.

    Returns:
        the matrix with similarities, time and stages.

    Raises:
        ValueError: for an unknown kind or similarity, a shape or matrix that does not fit, values that are not finite,
            an empty mask, or a constant scan; the message names what was found.

    Warns:
        UserWarning: when a stage fails (and the result is the last good one), or nothing improves on the headers.
    """
    began = time.perf_counter()
    _check(moving, fixed, kind, similarity, finest, max_scale)
    pair = (
        prepare(fixed, _matrix(fixed_affine), fixed_mask, "fixed"),
        prepare(moving, _matrix(moving_affine), moving_mask, "moving"),
    )
    run = _Registration(levels(*pair, finest), similarity, max_steps, progress)
    if kind == "centre":
        run.centre()
    else:
        run.optimise(kind, max_scale, min_overlap)
    objective = run.objective(-1)
    headers, found = np.eye(len(pair[0].affine)), run.stages[-1].matrix
    before, after = objective(headers), objective(found)
    if after < before and kind != "centre":
        warnings.warn(
            f"{kind} registration found nothing better than the headers (similarity {before:.4g}, found {after:.4g}), "
            "so the scans are left as their headers place them",
            stacklevel=2,
        )
        found, after = headers, before
    return AffineResult(found, before, after, objective.overlap(found), time.perf_counter() - began, tuple(run.stages))


class _Registration:
    """One run: the levels, what is measured on them, and the stages so far."""

    def __init__(
        self,
        pyramid: Sequence[Level],
        similarity: str,
        max_steps: int,
        progress: Callable[[AffineStage], None] | None,
    ) -> None:
        self.pyramid, self.similarity, self.max_steps, self.progress = pyramid, similarity, max_steps, progress
        self.stages: list[AffineStage] = []
        self._objectives: dict[int, Objective] = {}

    def objective(self, level: int) -> Objective:
        """The measure of a level, which is made once."""
        level %= len(self.pyramid)
        if level not in self._objectives:
            self._objectives[level] = Objective(self.pyramid[level], self.similarity)
        return self._objectives[level]

    def centre(self) -> None:
        """Lay the centres of mass on each other."""
        began = time.perf_counter()
        matrix = np.eye(len(self.pyramid[0].fixed.affine))
        matrix[:-1, -1] = self.pyramid[0].moving.centre - self.pyramid[0].fixed.centre
        self._finish("centre", -1, matrix, self.objective(-1)(matrix), 1, began)

    def optimise(self, kind: str, max_scale: float, min_overlap: float) -> None:
        """All stages from the first guesses on; a stage that fails is said to, and is the last."""
        self._start(scaled=kind != "rigid")
        last = len(self.pyramid) - 1
        plan = [("rigid", 0)] + ([("similarity", 0)] if kind == "affine" else [])
        plan += [(kind, level) for level in range(last + 1) if (kind, level) != ("rigid", 0)]
        for freedom, level in plan:
            began = time.perf_counter()
            matrix, value, evaluations = self._descend(freedom, level, self.stages[-1].matrix, self.max_steps)
            problem = _problem(matrix, self.objective(level).overlap(matrix), max_scale, min_overlap)
            if problem:
                warnings.warn(
                    f"the {freedom} stage at {self.pyramid[level].size:.3g} mm failed: {problem}; the result is "
                    f"that of the stage before ({self.stages[-1].kind}, similarity {self.stages[-1].similarity:.4g})",
                    stacklevel=3,
                )
                return
            self._finish(freedom, level, matrix, value, evaluations, began)

    def _start(self, scaled: bool) -> None:
        """Compare the first guesses at the coarsest level, follow the best a little, and keep the best of those."""
        began = time.perf_counter()
        objective, pair = self.objective(0), self.pyramid[0]
        headers = np.eye(len(pair.fixed.affine))
        apart = objective.overlap(headers) == 0.0
        if apart:
            logger.warning(
                "the scans do not meet in the world (centres of mass at %s mm, fixed, and %s mm, moving); "
                "they are brought together by their centres of mass",
                pair.fixed.centre.round(1).tolist(),
                pair.moving.centre.round(1).tolist(),
            )
        with few_threads(objective.fixed.numel()):
            tried = [(objective(matrix), matrix) for matrix in guesses(pair, scaled=scaled, headers=not apart)]
        # The order of equals is that of the guesses, the plainest first.
        tried.sort(key=lambda guess: -guess[0])
        chosen = distinct([matrix for _, matrix in tried], pair, _FOLLOWED)
        followed = [self._descend("rigid", 0, matrix, _TRIAL_STEPS) for matrix in chosen]
        matrix, value, _ = max(followed, key=lambda end: end[1])
        count = len(tried) + sum(evaluations for _, _, evaluations in followed)
        self._finish("start", 0, matrix, value, count, began)

    def _descend(self, kind: str, level: int, matrix: np.ndarray, steps: int) -> tuple[np.ndarray, float, int]:
        """The best map of a kind that is reached from a map at a level, its similarity, and the evaluations it took."""
        objective, size = self.objective(level), self.pyramid[level].size
        basis = generators(kind, len(matrix) - 1)
        with few_threads(objective.fixed.numel()):
            end = minimise(
                lambda parameters: objective.loss_and_slope(matrix, parameters, basis),
                objective.metric(basis),
                lambda change: objective.motion(basis, change),
                longest=_LONGEST * size,
                shortest=_SHORTEST * size,
                max_steps=steps,
            )
        return matrix @ objective.step(end.parameters, basis), -end.value, end.evaluations

    def _finish(self, kind: str, level: int, matrix: np.ndarray, value: float, evaluations: int, began: float) -> None:
        """Note a stage down, and tell of it."""
        size, overlap = self.pyramid[level].size, self.objective(level).overlap(matrix)
        stage = AffineStage(kind, size, matrix, value, overlap, evaluations, time.perf_counter() - began)
        self.stages.append(stage)
        logger.info(
            "%s at %.3g mm: %s %.4f, overlap %.2f, %.2f s",
            *(kind, size, self.similarity, value, overlap, stage.seconds),
        )
        if self.progress is not None:
            self.progress(stage)


def _problem(matrix: np.ndarray, overlap: float, max_scale: float, min_overlap: float) -> str:
    """What is wrong with a map, with the numbers; empty where nothing is."""
    scales = np.linalg.svd(matrix[:-1, :-1], compute_uv=False)
    if not np.all(np.isfinite(matrix)) or scales.max() > max_scale or scales.min() < 1 / max_scale:
        found = ", ".join(f"{scale:.3g}" for scale in scales)
        return f"it scales by {found}, expected between {1 / max_scale:.3g} and {max_scale:.3g}"
    if overlap < min_overlap:
        return f"{overlap:.1%} of the fixed foreground lies in the moving scan, expected at least {min_overlap:.1%}"
    return ""


def _check(moving: Tensor, fixed: Tensor, kind: str, similarity: str, finest: float | None, max_scale: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {list(SIMILARITIES)}, got {similarity!r}")
    if moving.dim() != fixed.dim():
        raise ValueError(f"moving {tuple(moving.shape)} and fixed {tuple(fixed.shape)} must have as many axes")
    if finest is not None and not finest > 0:
        raise ValueError(f"finest must be a positive voxel size in mm, got {finest}")
    if not max_scale > 1:
        raise ValueError(f"max_scale must be above 1, got {max_scale}")


def _matrix(affine: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(affine, Tensor):
        affine = affine.detach().cpu().numpy()
    return np.array(affine, dtype=np.float64)
