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
"""Random diffeomorphic deformations of a pair, with the exact field from one image to the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial import compose, integrate, resample_field
from common.transforms.perlin import PerlinLattice, isotropic_gradients, lattice_shape, perlin
from common.transforms.random_stream import RandomStream

__all__ = ["random_pair_fields", "random_velocities", "smallest_determinant"]

_SAMPLES_PER_CELL = 8
# Brings the root mean square of the displacements to the published figures.
_GAIN = 0.94
# Largest slope of a velocity, in voxels a voxel, that is tried; and the step of going below it.
_STEEPEST, _BACK_OFF = 2.0, 0.96


def random_pair_fields(
    stream: RandomStream, spatial_size: Sequence[int], amplitudes: Sequence[float], scale: float
) -> tuple[Tensor, Tensor]:
    """Draw the deformations of a pair.

    With stationary velocities v_m and v_f the two images see the scene S through phi_m = exp(v_m) and phi_f = exp(v_f).
    The answer is phi_m^-1 o phi_f, and phi_m^-1 = exp(-v_m) needs no inversion. To leave no discretisation error
    between answer and images, the fixed image should see the scene through *phi_m o (id + ddf)*, that is
    ``compose(moving, ddf)``, in place of exp(v_f). Which of the two it sees is of no consequence (they differ by 0.04
    voxels on average at amplitude 6, 0.25 at 18), but with the former the answer is exact to rounding.

    Velocities are smooth, so they are integrated on a grid with eight samples a noise cell, about a quarter of the
    image's resolution.

    Args:
        stream: B items to draw.
        spatial_size: of the images.
        amplitudes: factors of the velocity, in voxels; each deformation picks one. The root mean square of the
            displacement's length is about 0.31 of it.
        scale: edge of a cell of the velocity noise, in voxels.

    Returns:
        ``ddf`` from fixed to moving and ``moving`` from moving to the scene, each (B, d, *spatial_size), voxels.
    """
    velocity = random_velocities(stream, spatial_size, amplitudes, scale)
    ddf, moving = _unfolded(velocity)
    return resample_field(ddf, spatial_size, align_corners=True), resample_field(
        moving, spatial_size, align_corners=True
    )


def random_velocities(
    stream: RandomStream, spatial_size: Sequence[int], amplitudes: Sequence[float], scale: float
) -> Tensor:
    """Draw two velocity fields an item: per component, noise of one octave, or two with equal chance.

    Args:
        stream: B items to draw.
        spatial_size: of the images.
        amplitudes: factors of the noise, in voxels.
        scale: edge of a cell of the first octave, in voxels. The second has half the edge and half the amplitude.

    Returns:
        (B, 2, d, *coarse_size), in voxels of the coarse grid, whose corner voxels are those of the image.
    """
    dims = len(spatial_size)
    spacing, positions = _coarse_grid(spatial_size, scale / _SAMPLES_PER_CELL, stream.device)
    amplitude = stream.choice(amplitudes, 2, 1)
    second = stream.chance(0.5, 2, dims)
    noise = _noise(stream, spatial_size, positions, scale) + 0.5 * _noise(
        stream, spatial_size, positions, scale / 2, second
    )
    # An axis of one voxel has nowhere to go.
    units = torch.tensor(
        [_GAIN / h if n > 1 else 0.0 for h, n in zip(spacing, spatial_size, strict=True)], device=stream.device
    )
    return noise * (amplitude * units).view(len(stream), 2, dims, *(1,) * dims)


def _noise(
    stream: RandomStream,
    spatial_size: Sequence[int],
    positions: Sequence[Tensor],
    cell: float,
    present: Tensor | None = None,
) -> Tensor:
    """(B, 2, d, *coarse) noise; ``present`` (B, 2, d) says which components have it."""
    dims = len(spatial_size)
    count = len(stream) * 2 * dims
    nodes = lattice_shape([n - 1 for n in spatial_size], cell)
    phases = stream.uniform(2 * dims, dims).flatten(0, 1)
    gradients = isotropic_gradients(stream.normal(2 * dims, dims, *nodes).flatten(0, 1))
    if present is not None:
        gradients = gradients * present.view(-1, *(1,) * (dims + 1))
    zeros = torch.zeros(count, device=stream.device)
    noise = perlin(PerlinLattice(gradients, zeros, torch.full_like(phases, cell), phases), positions)
    return noise.view(len(stream), 2, dims, *noise.shape[1:])


def _coarse_grid(spatial_size: Sequence[int], step: float, device: torch.device) -> tuple[list[float], list[Tensor]]:
    """Spacing and coordinates, in voxels, of a grid that ends where the image ends and steps by at most ``step``."""
    counts = [min(n, math.ceil((n - 1) / step) + 1) for n in spatial_size]
    spacing = [(n - 1) / (c - 1) if c > 1 else 1.0 for n, c in zip(spatial_size, counts, strict=True)]
    positions = [torch.arange(c, device=device, dtype=torch.float32) * h for c, h in zip(counts, spacing, strict=True)]
    return spacing, positions


def _unfolded(velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate (B, 2, d, *coarse) velocities to the fields fixed to moving and moving to scene, both free of folds.

    The exponential of a velocity never folds, but steep ones squeeze voxels further than a grid can hold, and then the
    samples fold. A pair whose samples do has its velocities reduced until they do not. At the default amplitudes that
    happens to one pair in twenty at 64^3, by some percent.
    """
    dims = velocity.shape[2]
    slopes = [velocity.diff(dim=axis).abs() for axis in range(3, 3 + dims) if velocity.shape[axis] > 1]
    steepest = torch.stack([velocity.new_zeros(len(velocity)), *(slope.flatten(1).amax(1) for slope in slopes)]).amax(0)
    # Far beyond what can be held: get there at once.
    factor = (_STEEPEST / steepest).clamp(max=1.0)
    while True:
        moving, fixed = (velocity * factor.view(-1, *(1,) * (velocity.dim() - 1))).unbind(1)
        inverse, moving, fixed = integrate(torch.cat([-moving, moving, fixed])).chunk(3)
        ddf = compose(inverse, fixed)
        holds = torch.minimum(smallest_determinant(ddf), smallest_determinant(moving)) > 0
        if bool(holds.all()):
            return ddf, moving
        factor = torch.where(holds, factor, _BACK_OFF * factor)


def smallest_determinant(ddf: Tensor) -> Tensor:
    """The smallest Jacobian determinant of x + ddf(x) by one-sided differences, over all voxels and choices of side.

    Where it is positive, linear interpolation between the voxels keeps the orientation at every corner of every cell.
    Unlike central differences, one-sided ones see a checkerboard (Liu et al., "On finite difference Jacobian
    computation in deformable image registration", 2024).

    Args:
        ddf: (B, d, *S), 2-D or 3-D, voxels.

    Returns:
        (B,). An axis of one voxel counts as undeformed.
    """
    dims = ddf.shape[1]
    smallest = []
    for corner in itertools.product((0, 1), repeat=dims):
        columns = [_edges(ddf, axis, corner).unbind(1) for axis in range(dims)]
        smallest.append(_determinant(columns).flatten(1).amin(1))
    return torch.stack(smallest).amin(0)


def _edges(ddf: Tensor, axis: int, corner: Sequence[int]) -> Tensor:
    """d(x + ddf) / dx_axis along the edge of every grid cell that starts at the given corner of the cell."""
    size = ddf.shape[2:]
    edges = ddf.diff(dim=2 + axis) if size[axis] > 1 else torch.zeros_like(ddf)
    for other, length in enumerate(size):
        if other != axis and length > 1:
            edges = edges.narrow(2 + other, corner[other], length - 1)
    unit = torch.eye(len(size), dtype=ddf.dtype, device=ddf.device)[axis]
    return edges + unit.view(1, -1, *(1,) * len(size))


def _determinant(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Determinants of 2 x 2 or 3 x 3 matrices given entry by entry."""
    if len(columns) == 2:
        (a, b), (c, d) = columns
        return a * d - b * c
    (a, b, c), (d, e, f), (g, h, i) = columns
    return a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)
