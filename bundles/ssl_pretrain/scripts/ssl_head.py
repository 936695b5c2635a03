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
"""The light decoder that an encoder is pretrained with, and thrown away after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks import (
    Encoder,
    FlowHead,
    InstanceNorm,
    convolution,
    convolve,
    paired_channels,
    to_image_grid,
    upsample_to,
)

__all__ = ["GaussianField", "GaussianFlowHead", "LevelBlock", "SSLHead"]


class GaussianField(NamedTuple):
    """A normal distribution of the displacement in each voxel, components independent.

    Attributes:
        mean: (B, d, *S), voxels of the grid S.
        logvar: logarithm of the variance, the same shape.
    """

    mean: Tensor
    logvar: Tensor


class LevelBlock(nn.Module):
    """Two convolutions with instance normalisation and leaky ReLU, linear upsampling between them.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the encoder's map.
        hidden_channels: channels out.
    """

    def __init__(self, spatial_dims: int, in_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, hidden_channels)
        self.conv2 = convolution(spatial_dims, hidden_channels, hidden_channels)
        self.norm = InstanceNorm(hidden_channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Map (B, in_channels, *s) to (B, hidden_channels, *size)."""
        x = F.leaky_relu(self.norm(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm(self.conv2(upsample_to(x, size))), 0.01)


class GaussianFlowHead(nn.Module):
    """Mean and log-variance of a field, each by a convolution; the two run as one, in float32.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the features.
    """

    def __init__(self, spatial_dims: int, in_channels: int) -> None:
        super().__init__()
        self.mean = FlowHead(spatial_dims, in_channels, std=1e-5)
        self.logvar = FlowHead(spatial_dims, in_channels, std=1e-10, bias=-10.0)

    def forward(self, x: Tensor) -> GaussianField:
        """Features (B, in_channels, *S) to a distribution on S."""
        weight = torch.cat((self.mean.conv.weight, self.logvar.conv.weight))
        bias = torch.cat((self.mean.conv.bias, self.logvar.conv.bias))
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = convolve(x.float(), weight, bias).chunk(2, dim=1)
        return GaussianField(mean, logvar)


class SSLHead(nn.Module):
    """Multi-level head of the random-image pretraining (Chen et al., arXiv 2505.24167).

    Each level of the encoder is brought to one grid, twice as fine as its finest map (or the input grid, if the finest
    map lies there), and predicts a distribution of the field; the sum of the levels predicts the ensemble, which is the
    output. The levels are held to the ensemble by a Kullback-Leibler term only. Channels and factors come from what the
    encoder declares. The second output is a log-variance throughout (in the published code it is one when sampled and a
    log-deviation in the loss).

    Args:
        encoder: gives channels, strides and pairing; it is not kept.
        hidden_channels: channels of the level blocks.
    """

    def __init__(self, encoder: Encoder, hidden_channels: int = 16) -> None:
        super().__init__()
        dims = encoder.spatial_dims
        self.stride = max(1, encoder.strides[0] // 2)
        self.blocks = nn.ModuleList(LevelBlock(dims, c, hidden_channels) for c in paired_channels(encoder))
        self.heads = nn.ModuleList(GaussianFlowHead(dims, hidden_channels) for _ in self.blocks)
        self.ensemble = GaussianFlowHead(dims, hidden_channels)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, list[GaussianField]]:
        """A field from the maps of a pair.

        Args:
            features: maps of ``encode_pair``, fine to coarse, of an input whose axes are multiples of the strides.
            size: size of the encoder's input.

        Returns:
            the field (B, d, *size) in voxels of that grid, a sample of the ensemble in training and its mean otherwise;
            and the distributions of the levels, fine to coarse, then of the ensemble, on the head's own grid
            (``size / stride``) and in its voxels.
        """
        grid = [n // self.stride for n in size]
        levels = [block(feature, grid) for block, feature in zip(self.blocks, features, strict=True)]
        stats = [head(level) for head, level in zip(self.heads, levels, strict=True)]
        ensemble = self.ensemble(torch.stack(levels).sum(dim=0))
        field = ensemble.mean
        if self.training:
            field = field + torch.exp(0.5 * ensemble.logvar) * torch.randn_like(field)
        return to_image_grid(field, size), [*stats, ensemble]
