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
"""Random intensities: one value a label, and what a scanner adds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from common.transforms.perlin import PerlinLattice, isotropic_gradients, lattice_shape, perlin
from common.transforms.random_stream import RandomStream

__all__ = ["bias_field", "blur", "intensity_tables", "look_up", "rescale_intensity"]

# Published range of the tissues' mean intensities, of 255.
_DARKEST, _BRIGHTEST = 25.0 / 255.0, 225.0 / 255.0


def intensity_tables(stream: RandomStream, num_labels: int, multimodal_prob: float) -> Tensor:
    """Draw the intensity of each label in both images.

    Args:
        stream: B items to draw.
        num_labels: labels 1 to num_labels get an intensity, label 0 has intensity 0.
        multimodal_prob: probability that the two images have independent tables; otherwise they share one.

    Returns:
        (B, 2, num_labels + 1), moving first.
    """
    tables = stream.uniform(2, num_labels, low=_DARKEST, high=_BRIGHTEST)
    multimodal = stream.chance(multimodal_prob, 1)
    fixed = torch.where(multimodal, tables[:, 1], tables[:, 0])
    return torch.nn.functional.pad(torch.stack([tables[:, 0], fixed], 1), (1, 0))


def look_up(table: Tensor, labels: Tensor) -> Tensor:
    """(B, 1, *S) labels to their intensities in a (B, labels) table."""
    items = [t.index_select(0, map_.flatten().int()).view(map_.shape) for t, map_ in zip(table, labels, strict=True)]
    return torch.stack(items)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with its own width for every channel; the border is repeated.

    Args:
        images: (B, C, *S).
        sigma: (B, C), standard deviations in voxels; 0 leaves a channel as it is.
    """
    dims = images.ndim - 2
    radius = math.ceil(3.0 * float(sigma.max()))
    if radius == 0:
        return images
    taps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernels = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3).view(-1, 1)) ** 2)
    kernels = kernels / kernels.sum(1, keepdim=True)
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    blurred = images.reshape(1, -1, *images.shape[2:])
    for axis in range(dims):
        around = [0, 0] * dims
        around[2 * (dims - 1 - axis)] = around[2 * (dims - 1 - axis) + 1] = radius
        shape = [1] * dims
        shape[axis] = -1
        weight = kernels.view(len(kernels), 1, *shape)
        blurred = convolve(torch.nn.functional.pad(blurred, around, mode="replicate"), weight, groups=len(kernels))
    return blurred.view_as(images)


def bias_field(stream: RandomStream, spatial_size: Sequence[int], strength: Tensor) -> Tensor:
    """Draw smooth positive factors exp(strength * noise), whose noise has about one cell across the image.

    Args:
        stream: B items to draw.
        spatial_size: of the images.
        strength: (B, C), 0 gives the factor 1.

    Returns:
        (B, C, *spatial_size).
    """
    dims, channels = len(spatial_size), strength.shape[1]
    cell = float(max(spatial_size))
    nodes = lattice_shape([n - 1 for n in spatial_size], cell)
    phases = stream.uniform(channels, dims).flatten(0, 1)
    gradients = isotropic_gradients(stream.normal(channels, dims, *nodes).flatten(0, 1))
    # Values of Perlin noise stay below about 0.7; doubled, the factor's logarithm fills the strength.
    gradients = gradients * (2.0 * strength).view(-1, *(1,) * (dims + 1))
    lattice = PerlinLattice(gradients, torch.zeros_like(phases[:, 0]), torch.full_like(phases, cell), phases)
    positions = [torch.arange(n, device=strength.device, dtype=torch.float32) for n in spatial_size]
    return perlin(lattice, positions).exp_().view(*strength.shape, *spatial_size)


def rescale_intensity(images: Tensor, together: Tensor) -> Tensor:
    """Bring images linearly to [0, 1]; a constant image becomes 0.

    Args:
        images: (B, C, *S).
        together: (B,) booleans: True takes one minimum and maximum for all channels of the item, so that what was equal
            in them stays equal; False takes each channel's own.
    """
    axes = tuple(range(2, images.ndim))
    low, high = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    together = together.view(-1, *(1,) * (images.ndim - 1))
    low = torch.where(together, low.amin(1, keepdim=True), low)
    high = torch.where(together, high.amax(1, keepdim=True), high)
    return ((images - low) / (high - low).clamp(min=1e-6)).clamp_(0.0, 1.0)
