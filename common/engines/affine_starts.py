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
"""First guesses of the map between two scans."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from common.engines.affine_groups import rotation
from common.engines.affine_pyramid import Level

__all__ = ["distinct", "guesses"]

# Radians about each axis. Heads are turned by up to 45 degrees, and a descent finds its way over some 20.
_ANGLES = {2: (0.0, -0.3, 0.3, -0.6, 0.6, -0.9, 0.9), 3: (0.0, -0.6, 0.6)}
_NEIGHBOURS = 0.7  # radians between two rotations that lead to the same optimum
_SCALES = (0.67, 1.5)  # of which the spread of the foregrounds may make use


def guesses(pair: Level, *, scaled: bool, headers: bool) -> Iterator[np.ndarray]:
    """Maps (d+1, d+1) from the world of the fixed to that of the moving scan, the plainest first.

    The fixed centre of mass is sent to where it is, to the moving centre of mass, or as the middles of the grids lie;
    about it every guess has a rotation and a scale, 1 or the ratio of the foregrounds' spreads.

    Args:
        pair: the scans.
        scaled: whether to try another scale than 1.
        headers: whether the place that the headers give is worth a try.
    """
    dims = len(pair.fixed.centre)
    places = [pair.fixed.centre] if headers else []
    places += [pair.moving.centre, pair.fixed.centre + pair.moving.middle - pair.fixed.middle]
    ratio = float(np.clip(pair.moving.radius / pair.fixed.radius, *_SCALES))
    scales = (1.0, ratio) if scaled and abs(ratio - 1) > 0.1 else (1.0,)
    turns = sorted(itertools.product(_ANGLES[dims], repeat=dims * (dims - 1) // 2), key=lambda turn: np.abs(turn).sum())
    seen: list[np.ndarray] = []
    for place in places:
        if any(np.linalg.norm(place - other) < pair.size for other in seen):
            continue
        seen.append(place)
        for turn, scale in itertools.product(turns, scales):
            matrix = np.eye(dims + 1)
            matrix[:-1, :-1] = scale * rotation(np.array(turn), dims)
            matrix[:-1, -1] = place - matrix[:-1, :-1] @ pair.fixed.centre
            yield matrix


def distinct(ranked: Sequence[np.ndarray], pair: Level, count: int) -> list[np.ndarray]:
    """The best guesses of which no two are neighbours: those around one false optimum would crowd the true one out.

    Args:
        ranked: maps, the best first.
        pair: the scans.
        count: how many to choose at most.
    """
    chosen: list[np.ndarray] = []
    for matrix in ranked:
        if len(chosen) < count and not any(_near(matrix, other, pair) for other in chosen):
            chosen.append(matrix)
    return chosen


def _near(first: np.ndarray, second: np.ndarray, pair: Level) -> bool:
    """Whether two guesses send the fixed centre to about the same place, turned by about the same rotation."""
    change = first - second
    shift = change[:-1, :-1] @ pair.fixed.centre + change[:-1, -1]
    dims = len(shift)
    product = first[:-1, :-1].T @ second[:-1, :-1]
    product /= abs(np.linalg.det(product)) ** (1 / dims)
    cosine = (np.trace(product) - (dims - 2)) / 2
    return bool(cosine > np.cos(_NEIGHBOURS) and np.linalg.norm(shift) < 0.5 * pair.moving.radius)
