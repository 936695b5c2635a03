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
"""The encoder of the dual-stream pyramid, one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from common.networks.base import Encoder
from common.networks.convolution import convolution
from common.networks.residual import ResidualBlock, initialize
from common.networks.slabs import is_large, residual_by_slabs

__all__ = ["DualStreamEncoder"]


class DualStreamEncoder(Encoder):
    """A residual pyramid on one image; the same weights serve moving and fixed image.

    A 1x1 convolution, a residual block on the image grid, and one of stride 2 a level.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        channels: channels of each level, fine to coarse.
    """

    def __init__(
        self, spatial_dims: int = 3, in_channels: int = 1, channels: Sequence[int] = (16, 32, 32, 64, 64)
    ) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.pairing = spatial_dims, in_channels, "separate"
        self.feature_channels = tuple(channels)
        self.strides = tuple(2**level for level in range(len(channels)))
        self.projection = convolution(spatial_dims, in_channels, channels[0], 1)
        initialize(self.projection)
        blocks = [ResidualBlock(spatial_dims, channels[0], channels[0])]
        blocks += [ResidualBlock(spatial_dims, a, b, stride=2) for a, b in pairwise(channels)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_channels, *S) to maps at strides 1, 2, 4, ..."""
        features = [self._first(x)]
        for block in self.blocks[1:]:
            features.append(block(features[-1]))
        return features

    def _first(self, x: Tensor) -> Tensor:
        first: Tensor
        if is_large(x, self.feature_channels[0]):
            (first,) = residual_by_slabs(
                self.blocks[0], lambda start, stop: self.projection(x[:, :, start:stop]), x.shape[2:]
            )
        else:
            first = self.blocks[0](self.projection(x))
        return first
