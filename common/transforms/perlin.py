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
"""Gradient (Perlin) noise of any dimension, evaluated off its lattice with matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PerlinLattice", "fade", "isotropic_gradients", "lattice_shape", "perlin"]


class PerlinLattice(NamedTuple):
    """What defines N noise functions: ``noise_n(x) = perlin(x / cell_n + phase_n)``.

    Args:
        gradients: (N, d, *nodes), the gradient at every lattice node.
        values: (N,), added to the noise.
        cells: (N, d), edge lengths of a lattice cell, in the units of the sampling positions.
        phases: (N, d), where the position 0 lies in its cell, in cells, in [0, 1).
    """

    gradients: Tensor
    values: Tensor
    cells: Tensor
    phases: Tensor


def fade(t: Tensor) -> Tensor:
    """Perlin's blending polynomial 6t^5 - 15t^4 + 10t^3 on [0, 1] (Perlin, "Improving noise", 2002)."""
    return t * t * t * (t * (6.0 * t - 15.0) + 10.0)


def isotropic_gradients(normal: Tensor) -> Tensor:
    """Unit vectors, uniform on the sphere, from independent standard normal numbers.

    Uniformly drawn polar angles, as in the published generator, would favour the polar axis.

    Args:
        normal: (N, d, ...), standard normal numbers.

    Returns:
        (N, d, ...), with unit length along dimension 1.
    """
    return torch.nn.functional.normalize(normal, dim=1, eps=1e-6)


def lattice_shape(extents: Sequence[float], cell: float) -> tuple[int, ...]:
    """How many nodes a lattice of cells of edge ``cell`` needs to cover [0, extent] on each axis at any phase."""
    return tuple(int(extent / cell) + 3 for extent in extents)


def perlin(lattice: PerlinLattice, positions: Sequence[Tensor]) -> Tensor:
    """Evaluate the noise on a rectilinear grid.

    Every node i contributes ``value + gradient . (x - i)``, weighted by the product over the axes of
    ``fade(1 - |x - i|)``. Both factors separate over the axes, so the sum over the nodes is one matrix product an axis:
    no gathering of corners, and the cost of a sample does not depend on where it lies in its cell.

    Args:
        lattice: N noise functions in d dimensions.
        positions: d tensors of shape (n_a,), the coordinates along each axis.

    Returns:
        (N, n_1, ..., n_d), within about [-1, 1] for unit gradients and value 0.

    Raises:
        ValueError: when the number of axes differs from the lattice's.
    """
    gradients = lattice.gradients
    dims = gradients.shape[1]
    if len(positions) != dims:
        raise ValueError(f"the lattice has {dims} axes, but positions are given for {len(positions)}")
    nodes = gradients.shape[2:]
    # `done` carries the terms whose gradient component is used up, `pending` the components of the axes to come.
    done = lattice.values.view(-1, *(1,) * dims).expand(-1, *nodes)
    pending = gradients
    for axis, coordinates in enumerate(positions):
        offset = coordinates / lattice.cells[:, axis, None] + lattice.phases[:, axis, None]
        offset = offset.unsqueeze(-1) - torch.arange(nodes[axis], device=offset.device, dtype=offset.dtype)
        blend = fade((1.0 - offset.abs()).clamp_(min=0.0))
        both = torch.cat([blend, offset * blend], dim=-1)  # (N, n, 2 * nodes)
        done = _contract(both, torch.cat([done, pending[:, 0]], dim=1 + axis), axis)
        pending = (
            torch.stack([_contract(blend, rest, axis) for rest in pending[:, 1:].unbind(1)], 1)
            if axis + 1 < dims
            else pending
        )
    return done


def _contract(matrix: Tensor, data: Tensor, axis: int) -> Tensor:
    """Apply (N, n, m) matrices to axis ``axis`` (of length m) of (N, *spatial) data."""
    count, rows, columns = matrix.shape
    shape = data.shape[1:]
    if axis == len(shape) - 1:
        moved = torch.matmul(data.reshape(count, -1, columns), matrix.transpose(1, 2))
        return moved.view(count, *shape[:-1], rows)
    before, after = shape[:axis].numel(), shape[axis + 1 :].numel()
    moved = torch.matmul(matrix.unsqueeze(1), data.reshape(count, before, columns, after))
    return moved.view(count, *shape[:axis], rows, *shape[axis + 1 :])
