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

__all__ = ["Inversion", "invert"]


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
def invert(ddf: Tensor, *, max_iterations: int = 50, tolerance: float = 1e-3, padding: str = "border") -> Inversion:
    """The field that leads back, by the fixed point ``inverse(x) = -ddf(x + inverse(x))``.

    Converges when ``ddf`` is a contraction (no derivative of 1 or more). No gradient flows through it.
    Source: Chen et al., A simple fixed-point approach to invert a deformation field (Medical Physics 2008).

    Args:
        ddf: (B, d, *S), voxels.
        max_iterations: at most so many.
        tolerance: voxels; the greatest residual to stop at.
        padding: of ``ddf`` outside its grid.

    Returns:
        an :class:`Inversion`.

    Raises:
        ValueError: when ``ddf`` is no field.

    Warns:
        UserWarning: when an item did not converge.
    """
    ddf = as_field(ddf)
    inverse, iterations = -ddf, 0
    while True:
        back = -sample_linear(ddf, inverse, padding)
        residual = (inverse - back).square().sum(1).flatten(1).amax(1).sqrt()
        converged = residual <= tolerance
        if bool(converged.all()) or iterations >= max_iterations:
            break
        # Items that are done rest, so that none depends on what it shares its batch with.
        inverse = torch.where(converged.view(-1, *(1,) * (ddf.dim() - 1)), inverse, back)
        iterations += 1
    if not bool(converged.all()):
        warnings.warn(
            f"no inverse within {tolerance} voxels after {iterations} iterations: residuals {residual.tolist()}",
            stacklevel=2,
        )
    return Inversion(inverse, residual, converged, iterations)
