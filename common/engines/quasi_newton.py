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
"""A quasi-Newton method for a dozen parameters whose every value costs a pass over an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["Minimum", "minimise"]

_SUFFICIENT = 1e-4  # of the decrease that the slope promises (Armijo's rule)
_TRIES = 6


@dataclass(frozen=True)
class Minimum:
    """Where the search ended.

    Attributes:
        parameters: (K,) the best that were seen.
        value: of the function there.
        steps: that were taken.
        evaluations: of the function.
    """

    parameters: np.ndarray
    value: float
    steps: int
    evaluations: int


def minimise(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    metric: np.ndarray,
    size: Callable[[np.ndarray], float],
    *,
    longest: float,
    shortest: float,
    max_steps: int,
    flat: float = 1e-5,
) -> Minimum:
    """Descend from 0 by BFGS that starts from a known approximation of the second derivatives.

    With the Gauss-Newton matrix of a similar sum of squares as ``metric`` the first step is already of the right shape
    and nearly of the right length; the updates (Nocedal and Wright, Numerical Optimization, 6.1) learn the rest.

    Args:
        function: parameters (K,) to value and gradient.
        metric: (K, K) positive definite.
        size: how far a change of the parameters moves anything, in some unit of length.
        longest: no step moves anything further, so that nothing leaves the region where the gradient means something.
        shortest: a step that moves everything less ends the search.
        max_steps: and no more than these are taken.
        flat: two steps in a row that lower the value by less than this fraction end the search too.

    Returns:
        the minimum; its value is never above that at 0.
    """
    inverse = np.linalg.inv(metric)
    here = np.zeros(len(metric))
    value, slope = function(here)
    evaluations, steps, idle = 1, 0, 0
    while steps < max_steps:
        direction = -inverse @ slope
        if not direction @ slope < 0.0:
            break
        moved = size(direction)
        length = min(1.0, longest / moved) if moved > 0.0 else 1.0
        found = None
        for _ in range(_TRIES):
            step = length * direction
            trial, trial_slope = function(here + step)
            evaluations += 1
            promised = float(step @ slope)
            if trial <= value + _SUFFICIENT * promised:
                found = trial, trial_slope
                break
            # The lowest point of the parabola through what is known, kept away from both ends.
            bend = trial - value - promised
            length *= float(np.clip(-0.5 * promised / bend, 0.1, 0.5)) if np.isfinite(bend) and bend > 0 else 0.25
            if length * moved < shortest:
                break
        if found is None:
            break
        change = found[1] - slope
        inverse = _updated(inverse, step, change, first=steps == 0)
        idle = idle + 1 if value - found[0] < flat * abs(value) else 0
        here, value, slope = here + step, found[0], found[1]
        steps += 1
        if size(step) < shortest or idle == 2:
            break
    return Minimum(here, value, steps, evaluations)


def _updated(inverse: np.ndarray, step: np.ndarray, change: np.ndarray, *, first: bool) -> np.ndarray:
    """The inverse second derivatives after a step changed the gradient; unchanged where the curvature is not upward."""
    curvature = float(step @ change)
    if curvature <= 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(change)):
        return inverse
    if first:  # the metric has the right shape; the first step tells its scale
        inverse = inverse * float(np.clip(curvature / (change @ inverse @ change), 0.1, 10.0))
    left = np.eye(len(step)) - np.outer(step, change) / curvature
    return left @ inverse @ left.T + np.outer(step, step) / curvature
