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

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.spatial import compose, integrate, resample_field
from common.transforms.perlin import PerlinLattice, isotropic_gradients, lattice_shape, perlin
from common.transforms.random_stream import RandomStream

__all__ = ["PairFields", "random_pair_fields", "random_velocities"]

_SAMPLES_PER_CELL = 8
_GAIN = 1.0


class PairFields(NamedTuple):
    """Fields of a pair, each (B, d, *S), float32, voxels, pull-back.

    Args:
        ddf: from fixed to moving, the answer of the registration.
        moving: from moving to the scene that both images show.
        fixed: from fixed to that scene. ``fixed(x) = ddf(x) + moving(x + ddf(x))``.
    """

    ddf: Tensor
    moving: Tensor
    fixed: Tensor


def random_pair_fields(
    stream: RandomStream, spatial_size: Sequence[int], amplitudes: Sequence[float], scale: float
) -> PairFields:
    """Draw the deformations of a pair.

    With stationary velocities v_m and v_f the two images see the scene S through phi_m = exp(v_m) and phi_f = exp(v_f).
    The answer is phi_m^-1 o phi_f, and phi_m^-1 = exp(-v_m) needs no inversion. To leave no discretisation error
    between answer and images, phi_f is then *defined* as phi_m o (id + ddf): it differs from exp(v_f) by a fraction of
    a voxel, which nobody can see, and what is returned is exact, which everybody can measure.

    Velocities are smooth, so integration and inversion run on a grid with eight samples a lattice cell, about
    a quarter of the image's resolution.

    Args:
        stream: B items to draw.
        spatial_size: of the images.
        amplitudes: factors of the velocity, in voxels; each deformation picks one. Noise of unit gradients stays below
            about 0.7, so velocities stay below about that fraction of the amplitude.
        scale: edge of a cell of the velocity noise, in voxels.
    """
    size = [int(n) for n in spatial_size]
    velocity = random_velocities(stream, size, amplitudes, scale)
    moving_velocity, fixed_velocity = velocity.unbind(1)
    inverse, moving, fixed = integrate(torch.cat([-moving_velocity, moving_velocity, fixed_velocity])).chunk(3)
    ddf = resample_field(compose(inverse, fixed), size, align_corners=True)
    moving = resample_field(moving, size, align_corners=True)
    return PairFields(ddf, moving, compose(moving, ddf))


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
