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
"""Pairs of random images with their label maps and the exact field that registers them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.spatial import compose, warp
from common.transforms.random_fields import random_pair_fields
from common.transforms.random_intensities import bias_field, blur, intensity_tables, look_up, rescale_intensity
from common.transforms.random_labels import random_labels
from common.transforms.random_stream import RandomStream, item_seeds

__all__ = ["ImagePair", "PairOptions", "generate_pair"]

Range = tuple[float, float]

# Images whose mean edge is shorter show the same scene smaller, instead of a few giant shapes.
_FULL_SCALE_SIZE = 64.0


class ImagePair(NamedTuple):
    """A batch of pairs.

    Args:
        moving: (B, 1, *S), float32 in [0, 1].
        fixed: (B, 1, *S), float32 in [0, 1].
        moving_label: (B, 1, *S), int32; 0 is background.
        fixed_label: (B, 1, *S), int32; 0 is background.
        ddf: (B, d, *S), float32, voxels: ``moving(x + ddf(x)) = fixed(x)`` up to contrast and noise.
        seeds: B seeds; ``generate_pair(S, seed=seeds[b])`` makes item b again.
    """

    moving: Tensor
    fixed: Tensor
    moving_label: Tensor
    fixed_label: Tensor
    ddf: Tensor
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class PairOptions:
    """What a random pair looks like. Lengths are voxels; each effect is drawn for each image on its own.

    Args:
        num_labels: number of tissues, labelled from 1.
        shape_scale: range of the edge of a noise cell of the label maps.
        volume_spread: how unequal the tissues' volumes are: spread of a constant added to each label's noise.
        field_scale: edge of a noise cell of the deformations.
        amplitudes: factors of the velocities, of which each deformation picks one.
        background: "zeros": out of the scene's view lie label 0 and intensity 0; "border": the scene's border goes on.
        multimodal_prob: probability that both images have their own intensities, as two modalities would.
        blur_prob: probability of a Gaussian blur.
        blur_sigma: range of its standard deviation.
        bias_prob: probability of a smooth multiplicative bias.
        bias_strength: range of the bias's strength, the largest change of the logarithm of the intensity.
        noise_prob: probability of zero-mean Gaussian noise.
        noise_std: range of its standard deviation; tissue intensities lie between 0.1 and 0.9.
        gamma_prob: probability of a gamma curve.
        gamma: range of the exponent; drawn uniformly in its logarithm.

    Raises:
        ValueError: when an option is out of its range.
    """

    num_labels: int = 16
    shape_scale: Range = (34.0, 50.0)
    volume_spread: float = 0.025
    field_scale: float = 32.0
    amplitudes: Sequence[float] = (4.0, 6.0, 8.0, 14.0, 16.0, 18.0)
    background: str = "zeros"
    multimodal_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: Range = (0.5, 1.5)
    bias_prob: float = 0.0
    bias_strength: Range = (0.1, 0.5)
    noise_prob: float = 0.0
    noise_std: Range = (0.01, 0.05)
    gamma_prob: float = 0.0
    gamma: Range = (0.67, 1.5)

    def __post_init__(self) -> None:
        for name in ("multimodal_prob", "blur_prob", "bias_prob", "noise_prob", "gamma_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        for name, least in (
            ("shape_scale", 1.0),
            ("blur_sigma", 0.0),
            ("bias_strength", 0.0),
            ("noise_std", 0.0),
            ("gamma", 1e-3),
        ):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(f"{name} must be a range (low, high) with {least} <= low <= high, got {(low, high)}")
        if not 1 <= self.num_labels < 2**15:
            raise ValueError(f"num_labels must be at least 1 (and below 32768), got {self.num_labels}")
        if not 0.0 <= self.volume_spread < math.inf:
            raise ValueError(f"volume_spread must be a finite number of at least 0, got {self.volume_spread}")
        if self.field_scale < 1.0:
            raise ValueError(f"field_scale must be at least 1 voxel, got {self.field_scale}")
        if len(self.amplitudes) == 0 or not all(0.0 <= a < math.inf for a in self.amplitudes):
            raise ValueError(f"amplitudes must be one or more finite numbers of at least 0, got {self.amplitudes}")
        if self.background not in ("zeros", "border"):
            raise ValueError(f"background must be 'zeros' or 'border', got {self.background!r}")


@torch.no_grad()
def generate_pair(
    spatial_size: Sequence[int],
    *,
    batch_size: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> ImagePair:
    """Draw pairs of random images.

    A scene of random shapes is seen through two random diffeomorphisms. Following "Pretraining Deformable Image
    Registration Networks with Random Images" (Chen et al., 2025), with the shapes off any lattice that both images
    share, velocities scaled before they are integrated, and the exact answer returned.

    On images whose edges' geometric mean is below 64 voxels, the scales and the amplitudes shrink in proportion.

    Args:
        spatial_size: of the images, 2-D or 3-D, any numbers.
        batch_size: number of pairs.
        seed: the seed of the first pair (pair b has seed + b), or one seed for each pair.
        generator: draws the pairs' seeds when there is no seed. Without either, torch's global generator does.
        device: where the pair is made. Shapes and fields are the same on every device; noise is not.
        options: fields of :py:class:`PairOptions`.

    Raises:
        ValueError: when the size is not 2-D or 3-D, or an option is out of its range.
        TypeError: when an option is unknown.
    """
    size = checked_size(spatial_size)
    chosen = PairOptions(**options)
    stream = RandomStream(item_seeds(batch_size, seed, generator), device)
    with torch.autocast(stream.device.type, enabled=False):
        return _generate(stream, size, chosen)


def checked_size(spatial_size: Sequence[int]) -> tuple[int, ...]:
    """The size as a tuple of integers.

    Raises:
        ValueError: when it is not 2-D or 3-D, or not positive.
    """
    size = tuple(int(n) for n in spatial_size)
    if len(size) not in (2, 3) or min(size) < 1:
        raise ValueError(f"spatial_size must be 2 or 3 positive numbers, got {tuple(spatial_size)}")
    return size


def _generate(stream: RandomStream, size: tuple[int, ...], options: PairOptions) -> ImagePair:
    """Draw everything, in an order that lets go of large fields early."""
    shrink = min(1.0, math.prod(size) ** (1.0 / len(size)) / _FULL_SCALE_SIZE)
    scale = (shrink * options.shape_scale[0], shrink * options.shape_scale[1])
    scene = random_labels(stream, size, options.num_labels, scale, options.volume_spread)
    amplitudes = [shrink * amplitude for amplitude in options.amplitudes]
    ddf, to_scene = random_pair_fields(stream, size, amplitudes, shrink * options.field_scale)
    tables = intensity_tables(stream, options.num_labels, options.multimodal_prob)
    moving, moving_label = _see(scene, tables[:, 0], to_scene, options.background)
    to_scene = compose(to_scene, ddf)
    fixed, fixed_label = _see(scene, tables[:, 1], to_scene, options.background)
    del to_scene
    same_contrast = (tables[:, 0] == tables[:, 1]).all(1)
    moving, fixed = _acquire(stream, torch.cat([moving, fixed], 1), same_contrast, options).split(1, dim=1)
    return ImagePair(moving, fixed, moving_label, fixed_label, ddf, stream.seeds)


def _see(scene: Tensor, table: Tensor, ddf: Tensor, background: str) -> tuple[Tensor, Tensor]:
    """The scene's image and label map under a deformation."""
    label = warp(scene, ddf, mode="nearest", padding=background)
    return warp(look_up(table, scene), ddf, padding=background), label.int()


def _acquire(stream: RandomStream, images: Tensor, same_contrast: Tensor, options: PairOptions) -> Tensor:
    """What a scanner does to (B, 2, *S) images: blur, bias, noise, and at last a window to [0, 1] and a gamma curve.

    Images of the same contrast share their window, otherwise moving(x + ddf(x)) would not equal fixed(x).
    All draws but the voxels' noise are made whatever the options, so that switching one on changes nothing else.
    """
    sigma = _sometimes(stream, options.blur_sigma, options.blur_prob)
    std = _sometimes(stream, options.noise_std, options.noise_prob)
    strength = _sometimes(stream, options.bias_strength, options.bias_prob)
    gamma = _sometimes(stream, (math.log(options.gamma[0]), math.log(options.gamma[1])), options.gamma_prob).exp()
    if options.blur_prob > 0:
        images = blur(images, sigma)
    if options.bias_prob > 0:
        images = images * bias_field(stream, images.shape[2:], strength)
    if options.noise_prob > 0:
        images = images + stream.voxel_noise(*images.shape[1:]) * _spread(std, images)
    images = rescale_intensity(images, same_contrast)
    return images ** _spread(gamma, images) if options.gamma_prob > 0 else images


def _sometimes(stream: RandomStream, limits: Range, probability: float) -> Tensor:
    """(B, 2) numbers, uniform within the limits with the given probability, otherwise 0."""
    return stream.uniform(2, low=limits[0], high=limits[1]) * stream.chance(probability, 2)


def _spread(values: Tensor, images: Tensor) -> Tensor:
    """(B, C) values with an axis of one for every spatial axis."""
    return values.view(*values.shape, *(1,) * (images.ndim - 2))
