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
"""Linear groups of physical space: their generators, and the maps that steps along them make.

A map is changed by composing it with the exponential of a sum of generators. Rotations, rotations with a common scale,
and all matrices of positive determinant are groups, so a rigid map stays rigid without any constraint, no order of
rotations has to be chosen, and no step can mirror an image.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

__all__ = ["KINDS", "box_corners", "generators", "rotation", "step_matrix"]

#: Kinds of maps, from the fewest freedoms to the most.
KINDS = ("centre", "rigid", "similarity", "affine")


def generators(kind: str, dims: int) -> np.ndarray:
    """The directions in which a map of this kind can change.

    Args:
        kind: "rigid", "similarity" or "affine"; "centre" has the translations only.
        dims: 2 or 3.

    Returns:
        (K, d+1, d+1): d translations, then rotations, then scales, then shears. A unit of each moves the points at
        distance 1 alike.
    """
    found = [_unit(dims, k, dims) for k in range(dims)]
    if kind != "centre":
        found += [_unit(dims, j, i) - _unit(dims, i, j) for i, j in itertools.combinations(range(dims), 2)]
    if kind == "similarity":
        found.append(np.diag([1.0] * dims + [0.0]))
    if kind == "affine":
        found += [_unit(dims, k, k) for k in range(dims)]
        found += [_unit(dims, j, i) + _unit(dims, i, j) for i, j in itertools.combinations(range(dims), 2)]
    return np.stack(found)


def step_matrix(parameters: Tensor, basis: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The map of a step: the exponential of generators that act about a centre, in units of a radius.

    Args:
        parameters: (K,) float64.
        basis: (K, d+1, d+1), from :func:`generators`.
        centre: (d,) in mm.
        radius: in mm, so that a unit of every parameter moves a point at this distance from the centre by about it.

    Returns:
        (d+1, d+1) float64, world to world; differentiable in the parameters.
    """
    dims = len(centre)
    there = torch.eye(dims + 1, dtype=torch.float64) * radius
    there[:dims, dims], there[dims, dims] = centre, 1.0
    inner = torch.linalg.matrix_exp(torch.einsum("k,kij->ij", parameters, basis))
    return there @ inner @ torch.linalg.inv(there)


def rotation(vector: np.ndarray, dims: int) -> np.ndarray:
    """The rotation (d, d) by the length of a vector, in radians, about its direction; in 2-D the vector is (angle,)."""
    skew = np.tensordot(np.asarray(vector, dtype=np.float64), generators("rigid", dims)[dims:, :dims, :dims], 1)
    return np.asarray(torch.linalg.matrix_exp(torch.from_numpy(skew)))


def box_corners(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The corners (2^d, d) of a box."""
    return np.array(list(itertools.product(*zip(low, high, strict=True))), dtype=np.float64)


def _unit(dims: int, row: int, column: int) -> np.ndarray:
    matrix = np.zeros((dims + 1, dims + 1))
    matrix[row, column] = 1.0
    return matrix
