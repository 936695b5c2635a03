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
"""Invert a displacement field."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from common.spatial.grid import as_field
from common.spatial.sampling import sample_linear
from common.spatial.warping import warp_points

__all__ = ["Inversion", "invert"]

_WORTHWHILE = 0.8  # what is left of the mean residual after an iteration that is worth another
_FEW = 0.05  # of all voxels: so many are sooner done one by one
_SHORTEST = 2.0**-7  # of Newton's step


class Inversion(NamedTuple):
    """What :func:`invert` found.

    Attributes:
        ddf: the inverse field (B, d, *S).
        residual: (B,) the greatest ``|inverse(x) + ddf(x + inverse(x))|`` in voxels.
        converged: (B,) whether the residual is within the tolerance.
        iterations: how many were made.
    """

    ddf: Tensor
    residual: Tensor
    converged: Tensor
    iterations: int


@torch.no_grad()
def invert(ddf: Tensor, *, max_iterations: int = 50, tolerance: float = 1e-3) -> Inversion:
    """The field that leads back. Outside its grid ``ddf`` goes on as it is at the border. No gradient flows through it.

    First by the fixed point ``inverse(x) = -ddf(x + inverse(x))``, which is fast, but converges only where no
    derivative of ``ddf`` is 1 or more (Chen et al., A simple fixed-point approach to invert a deformation field,
    Medical Physics 2008). A map may stretch more than that and have an inverse all the same: once the mean residual
    falls no more, what is left is found voxel by voxel with Newton's method, its steps halved while they lead astray.

    Args:
        ddf: (B, d, *S), voxels.
        max_iterations: at most so many, of both kinds together.
        tolerance: voxels; the greatest residual to stop at.

    Returns:
        an :class:`Inversion`.

    Raises:
        ValueError: when ``ddf`` is no field.

    Warns:
        UserWarning: when an item did not converge, as where it folds.
    """
    ddf = as_field(ddf)
    inverse, iterations = _fixed_point(ddf, max_iterations, tolerance)
    newton = [
        _newton(ddf[item : item + 1], inverse[item], max_iterations - iterations, tolerance) for item in range(len(ddf))
    ]
    residual = (inverse + sample_linear(ddf, inverse, "border")).square().sum(1).flatten(1).amax(1).sqrt()
    converged = residual <= tolerance
    if not bool(converged.all()):
        warnings.warn(
            f"no inverse within {tolerance} voxels after {iterations + max(newton)} iterations: "
            f"residuals {residual.tolist()}",
            stacklevel=2,
        )
    return Inversion(inverse, residual, converged, iterations + max(newton))


def _fixed_point(ddf: Tensor, max_iterations: int, tolerance: float) -> tuple[Tensor, int]:
    """The inverse as far as it goes, and after how many iterations."""
    inverse, iterations = -ddf, 0
    mean = torch.full((len(ddf),), torch.inf, device=ddf.device)
    while True:
        back = -sample_linear(ddf, inverse, "border")
        distance = (inverse - back).square().sum(1).flatten(1)
        now = distance.sqrt().mean(1)
        # Items that are done rest, so that none depends on what it shares its batch with.
        going = ((distance > tolerance**2).float().mean(1) > _FEW) & (now <= _WORTHWHILE * mean)
        if iterations >= max_iterations or not bool(going.any()):
            return inverse, iterations
        inverse = torch.where(going.view(-1, *(1,) * (ddf.dim() - 1)), back, inverse)
        mean = torch.where(going, now, -torch.inf)
        iterations += 1


def _newton(ddf: Tensor, inverse: Tensor, max_iterations: int, tolerance: float) -> int:
    """Better the inverse (d, *S) of a field (1, d, *S) in place, where it is not good; returns how many iterations."""
    left = (inverse + sample_linear(ddf, inverse[None], "border")[0]).square().sum(0) > tolerance**2
    if not bool(left.any()):
        return 0
    ddf = ddf.double()  # Positions are rounded where displacements are not.
    goal = left.nonzero().double()
    found = goal + inverse[:, left].T
    defect = warp_points(found[None], ddf)[0] - goal
    length = torch.ones_like(goal[:, :1])
    iterations = 0
    while iterations < max_iterations:
        # A little less, as the result is rounded.
        open_ = ((defect.square().sum(1) > (0.9 * tolerance) ** 2) & (length[:, 0] >= _SHORTEST)).nonzero()[:, 0]
        if not len(open_):
            break
        tried = found[open_] - length[open_] * _newton_step(ddf, found[open_], defect[open_])
        moved = warp_points(tried[None], ddf)[0] - goal[open_]
        better = moved.square().sum(1, keepdim=True) < defect[open_].square().sum(1, keepdim=True)
        found[open_] = torch.where(better, tried, found[open_])
        defect[open_] = torch.where(better, moved, defect[open_])
        length[open_] = torch.where(better, (2 * length[open_]).clamp(max=1), length[open_] / 2)
        iterations += 1
    inverse[:, left] = (found - goal).T.to(inverse.dtype)
    return iterations


def _newton_step(ddf: Tensor, points: Tensor, defect: Tensor) -> Tensor:
    """(N, d): the defect over the map's derivative at the points; the defect itself where that derivative folds."""
    dims = points.shape[1]
    columns = []
    for axis in range(dims):
        aside = torch.zeros_like(points[:1])
        aside[:, axis] = 0.5
        ahead, behind = (warp_points((points + side * aside)[None], ddf)[0] for side in (1, -1))
        columns.append(ahead - behind)
    derivative = torch.stack(columns, dim=-1)
    sound = torch.linalg.det(derivative) > 0.01
    identity = torch.eye(dims, dtype=derivative.dtype, device=derivative.device)
    return torch.linalg.solve(torch.where(sound[:, None, None], derivative, identity), defect)
