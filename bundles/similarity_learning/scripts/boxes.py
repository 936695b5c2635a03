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
"""Sums over a box around every voxel of images that go on beyond their edge with their last value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.checks import full_precision
from common.losses.windows import Kernel, window_sums

from .encoder import fold, replicate

__all__ = ["Box"]


@dataclass(frozen=True)
class Box:
    """The box of a local correlation, of ones or with weights.

    Args:
        half_width: s; the box has 2s + 1 voxels along each axis.
        weights: (1, 1, 2s + 1, ...), or None for ones, whose sums are taken axis by axis.
    """

    half_width: int
    weights: Tensor | None = None

    def sum(self, maps: Tensor) -> Tensor:
        """Sums of maps (N, 1, *S) in full precision, the same shape."""
        with full_precision(maps.device):
            if self.weights is not None:
                return _convolve(replicate(maps, self.half_width), self.weights)
            result: Tensor = _BoxSum.apply(maps, self.half_width)
            return result

    def reverse(self, gradient: Tensor) -> Tensor:
        """The gradient in the maps, (N, 1, *S), from the one in their sums."""
        with full_precision(gradient.device):
            if self.weights is None:
                return _reverse(gradient, self.half_width)
            mirrored = self.weights.flip(tuple(range(2, gradient.ndim)))
            return fold(_convolve(_zeros_around(gradient, 2 * self.half_width), mirrored), self.half_width)


class _BoxSum(torch.autograd.Function):
    """Keeps nothing: sums are linear."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, half_width: int) -> Tensor:
        ctx.half_width = half_width
        return window_sums(replicate(maps, half_width), Kernel(2 * half_width + 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _reverse(gradients[0], ctx.half_width), None


def _reverse(gradient: Tensor, half_width: int) -> Tensor:
    return fold(window_sums(_zeros_around(gradient, 2 * half_width), Kernel(2 * half_width + 1)), half_width)


def _zeros_around(maps: Tensor, width: int) -> Tensor:
    return F.pad(maps, (width,) * (2 * (maps.ndim - 2)))


def _convolve(maps: Tensor, weights: Tensor) -> Tensor:
    convolve = F.conv2d if maps.ndim == 4 else F.conv3d
    return convolve(maps, weights.to(maps.dtype))
