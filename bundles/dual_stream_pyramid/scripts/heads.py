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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.networks import FlowHead, ResidualBlock, convolve_by_slabs, is_large, residual_by_slabs

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

    def forward(self, *maps: Tensor) -> Tensor:
        """Maps (B, ?, *S) with in_channels together to (B, spatial_dims, *S), float32, in voxels of the level."""
        if is_large(maps[0], self.block.conv1.out_channels):
            size = maps[0].shape[2:]
            return self.flow_of(*residual_by_slabs(self.block, lambda *rows: _concatenated(maps, *rows), size))
        return self.flow_of(self.block(torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]))

    def flow_of(self, y: Tensor) -> Tensor:
        """The motion out of what the block made."""
        motion: Tensor
        if is_large(y, y.shape[1]):
            with torch.autocast(y.device.type, enabled=False):
                motion = convolve_by_slabs(self.flow.conv, lambda first, last: y[:, :, first:last], y.shape[2:])
        else:
            motion = self.flow(y)
        return motion


def _concatenated(maps: Sequence[Tensor], first: int, last: int) -> Tensor:
    return torch.cat([x[:, :, first:last] for x in maps], dim=1)
