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
"""Random label maps: at each voxel, the label whose noise is highest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.transforms.perlin import PerlinLattice, isotropic_gradients, lattice_shape, perlin
from common.transforms.random_stream import RandomStream

__all__ = ["random_labels"]

# Noise values alive at once: on a CPU they should stay in its cache, on a GPU the launches should be few.
_SLAB_VALUES = {"cpu": 2**21, "cuda": 2**26}


def random_labels(
    stream: RandomStream,
    spatial_size: Sequence[int],
    num_labels: int,
    scale: tuple[float, float],
    volume_spread: float = 0.0,
) -> Tensor:
    """Draw label maps.

    Each label has its own noise function with its own phase and cell size. Since the lattices do not coincide, no place
    in the image is special, unlike where all functions vanish at the nodes of one shared lattice.

    Args:
        stream: B items to draw.
        spatial_size: of the label maps.
        num_labels: how many labels compete. They are numbered from 1; 0 is kept for what lies outside the image.
        scale: range of the edge of a lattice cell, in voxels. A typical shape is about half as wide.
        volume_spread: standard deviation of a constant that is added to each label's noise, whose own standard
            deviation is about 0.25: some labels then take more room than others also in images of many cells.

    Returns:
        (B, 1, *spatial_size), uint8 (int16 above 255 labels), values 1 to num_labels.
    """
    dims = len(spatial_size)
    cells = stream.uniform(num_labels, 1, low=scale[0], high=scale[1]).expand(-1, -1, dims)
    phases = stream.uniform(num_labels, dims)
    nodes = lattice_shape([n - 1 for n in spatial_size], scale[0])
    gradients = stream.normal(num_labels, dims, *nodes)
    values = volume_spread * stream.normal(num_labels)
    positions = [torch.arange(n, device=stream.device, dtype=torch.float32) for n in spatial_size]
    maps = [
        _highest(
            PerlinLattice(isotropic_gradients(gradients[item]), values[item], cells[item], phases[item]), positions
        )
        for item in range(len(stream))
    ]
    return torch.stack(maps).unsqueeze(1)


def _highest(lattice: PerlinLattice, positions: Sequence[Tensor]) -> Tensor:
    """1 + the index of the highest of the N noise functions at every voxel, slab by slab along the first axis."""
    num_labels = lattice.gradients.shape[0]
    dtype = torch.uint8 if num_labels < 256 else torch.int16
    plane = num_labels * torch.Size([len(p) for p in positions[1:]]).numel()
    rows = max(1, _SLAB_VALUES.get(positions[0].device.type, 2**24) // plane)
    slabs = []
    for first in positions[0].split(rows):
        noise = perlin(lattice, [first, *positions[1:]])
        best, label = noise[0], torch.ones(noise.shape[1:], dtype=dtype, device=noise.device)
        # A running maximum: argmax over a strided dimension is five times slower.
        for index in range(1, num_labels):
            label.masked_fill_(noise[index] > best, index + 1)
            best = torch.maximum(best, noise[index])
        slabs.append(label)
    return torch.cat(slabs)
