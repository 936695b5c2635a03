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
"""What the embedded contrast cohort is made of: the atlas's anatomy, maps to it, and scanners that see it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.data.pairing import generator_for

__all__ = ["EDGE", "Anatomy", "Scanner", "Shape", "places_of"]

EDGE = 0.02
_STEEPEST = 0.7
_ITERATIONS = 60


def places_of(size: Sequence[int]) -> Tensor:
    """Every voxel, (d,*S) float64, from -1 to 1 along each axis, first to last voxel."""
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _waves(directions: np.ndarray, phases: np.ndarray, places: Tensor) -> Tensor:
    """Sines (K,*S) of K wave vectors (K,d), in radians a unit, at places (d,*S)."""
    arguments = torch.tensordot(torch.as_tensor(directions), places, dims=1)
    return torch.sin(arguments + torch.as_tensor(phases).view(-1, *[1] * (places.ndim - 1)))


def _directions(draw: np.random.Generator, count: int, dims: int, low: float, high: float) -> np.ndarray:
    """Wave vectors (count,d) of random directions whose lengths lie between two."""
    vectors = draw.standard_normal((count, dims))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors * draw.uniform(low, high, (count, 1)))


def _on_axes(values: Sequence[float] | Tensor, places: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=places.dtype).view(-1, *[1] * (places.ndim - 1))


class Shape:
    """The map from a subject to the atlas: the subject shows at ``y`` what the atlas has at ``shape(y)``.

    A few sines that fade towards the border. No derivative of the displacement exceeds 0.7, so the map is one to one
    and the fixed point iteration for its inverse converges.

    Args:
        size: the grid.
        magnitude: of the displacement; 1 is at most 4.5 to 6.5 voxels in 64.
        draw: of the sines.
    """

    def __init__(self, size: Sequence[int], magnitude: float, draw: np.random.Generator) -> None:
        dims, count = len(size), 8
        self.half = torch.tensor([(n - 1) / 2 for n in size], dtype=torch.float64)
        self.directions = _directions(draw, count, dims, 2.0, 6.0)
        self.phases = draw.uniform(0, 2 * np.pi, count)
        # Short waves are lower, for what counts is how steep they are.
        lengths = np.linalg.norm(self.directions, axis=1, keepdims=True)
        self.amplitudes = torch.as_tensor(draw.standard_normal((count, dims)) / lengths**1.5)
        reach = magnitude * float(draw.uniform(4.5, 6.5)) * min(size) / 64
        field = self.displacement(places_of(size)) * _on_axes(self.half, torch.empty(1, *size))
        slopes = torch.stack([torch.stack(torch.gradient(part)) for part in field]).flatten(2).movedim(2, 0)
        bound = slopes.square().sum((1, 2)).sqrt()
        # The largest singular value is at least the Frobenius norm over the root of d: no other voxel has the largest.
        steepest = float(torch.linalg.matrix_norm(slopes[bound >= bound.max() / dims**0.5], ord=2).max())
        self.amplitudes *= min(reach / float(field.norm(dim=0).max()), _STEEPEST / steepest)

    def displacement(self, places: Tensor) -> Tensor:
        """(d,*S) in units of half the image."""
        inside = (1 - places.clamp(-1, 1) ** 4).prod(0)
        waves = _waves(self.directions, self.phases, places)
        return (
            torch.tensordot(self.amplitudes.T, waves, dims=1) * inside / _on_axes(self.half / self.half.min(), places)
        )

    def __call__(self, places: Tensor) -> Tensor:
        """Where in the atlas the subject's places (d,*S) lie."""
        return places + self.displacement(places)

    def back(self, places: Tensor) -> Tensor:
        """The field (d,*S) float32, voxels, from the atlas's places to the subject's, to rounding."""
        found = torch.zeros_like(places)
        for _ in range(_ITERATIONS):
            before, found = found, -self.displacement(places + found)
            if float((found - before).abs().max()) < 1e-7:
                break
        return (found * _on_axes(self.half, places)).float()


class Anatomy:
    """What lies at which place of the atlas.

    Args:
        dims: 2 or 3.
        seed: of surfaces and texture; all subjects share them.
    """

    # Centre, radii, height of the waves on the surface, their length in radians a unit.
    STRUCTURES: tuple[tuple[tuple[float, ...], tuple[float, ...], float, float], ...] = (
        ((0.0, 0.0, 0.0), (0.74, 0.82, 0.74), 0.05, 9.0),
        ((0.0, 0.02, 0.0), (0.56, 0.64, 0.56), 0.09, 10.0),
        ((-0.13, 0.14, 0.08), (0.10, 0.27, 0.22), 0.10, 5.0),
        ((0.13, 0.14, 0.08), (0.10, 0.27, 0.22), 0.10, 5.0),
        ((-0.35, 0.0, 0.0), (0.13, 0.22, 0.22), 0.10, 5.0),
        ((0.35, 0.0, 0.0), (0.13, 0.22, 0.22), 0.10, 5.0),
        ((0.0, -0.36, -0.14), (0.15, 0.16, 0.26), 0.06, 5.0),
    )

    def __init__(self, dims: int, seed: int) -> None:
        draw = generator_for(seed, 8)
        self.surfaces = [
            (_directions(draw, 5, dims, 0.7 * length, length), draw.uniform(0, 2 * np.pi, 5))
            for *_, length in self.STRUCTURES
        ]
        self.texture = (_directions(draw, 10, dims, 8.0, 18.0), draw.uniform(0, 2 * np.pi, 10))

    def __call__(self, places: Tensor) -> tuple[list[Tensor], Tensor]:
        """Level sets (*S) of all structures, positive inside and in units of half the image, and the texture (*S)."""
        levels = []
        for (centre, radii, height, _), waves in zip(self.STRUCTURES, self.surfaces, strict=True):
            dims = len(places)
            own = (places - _on_axes(centre[:dims], places)) / _on_axes(radii[:dims], places)
            level = 1 - own.square().sum(0).sqrt() + height * _waves(*waves, places).mean(0)
            levels.append(level * min(radii[:dims]))
        return levels, _waves(*self.texture, places).mean(0)


class Scanner:
    """What a scanner makes of tissue.

    Args:
        dims: 2 or 3.
        contrast: how far from the atlas's.
        draw: of power, levels, bias field and noise.
    """

    # The stem is the brightest in any scan, so that no rescaling of intensities undoes the power law.
    ATLAS = (0.02, 0.28, 0.62, 0.10, 0.10, 0.40, 0.40, 0.90)

    def __init__(self, dims: int, contrast: float, draw: np.random.Generator) -> None:
        self.draw = draw
        power = np.exp(contrast * draw.uniform(-1.1, -0.8))
        self.levels = [level**power + 0.02 * contrast * draw.standard_normal() for level in self.ATLAS]
        self.levels[0] = self.ATLAS[0]
        self.bias = 0.6 * contrast * float(draw.uniform(0.7, 1.0))
        self.waves = (_directions(draw, 3, dims, 1.2, 2.4), draw.uniform(0, 2 * np.pi, 3))

    def __call__(self, levels: Sequence[Tensor], texture: Tensor, noise: float) -> Tensor:
        """The image (*S) float32 in [0,1] of structures and texture."""
        intensity = torch.full_like(texture, self.levels[0])
        for level, own in zip(levels, self.levels[1:], strict=True):
            share = torch.sigmoid(level / EDGE)
            intensity = intensity * (1 - share) + own * share
        intensity = intensity + 0.12 * texture * torch.sigmoid(levels[0] / EDGE)
        places = places_of(texture.shape)
        intensity = intensity * torch.exp(self.bias * (_waves(*self.waves, places).mean(0) - 0.5))
        added = torch.as_tensor(self.draw.standard_normal(tuple(texture.shape)))
        return (intensity + noise * added).clamp(0, 1).float()
