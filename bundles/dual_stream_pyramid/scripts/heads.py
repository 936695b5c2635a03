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
"""The head that predicts a level's motion."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks import FlowHead, ResidualBlock

__all__ = ["PredictionHead"]


class PredictionHead(nn.Module):
    """From what is known of a level to its motion: a residual block and a convolution that starts near zero.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        channels: of the residual block.
    """

    def __init__(self, spatial_dims: int, in_channels: int, channels: int) -> None:
        super().__init__()
        self.block = ResidualBlock(spatial_dims, in_channels, channels)
        self.flow = FlowHead(spatial_dims, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, *S) to (B, spatial_dims, *S), float32, in voxels of the level."""
        motion: Tensor = self.flow(self.block(x))
        return motion
