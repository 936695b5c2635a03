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
"""The U-shaped encoder of VFA (Liu et al., "Vector field attention for deformable image registration", 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from common.networks.base import Encoder
from common.networks.blocks import ConvUnit, InstanceNorm
from common.networks.convolution import convolution

__all__ = ["VFAEncoder"]

_SLOPE = 0.01


def _double(spatial_dims: int, in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvUnit(spatial_dims, in_channels, out_channels, norm="instance_affine", bias=True),
        ConvUnit(spatial_dims, out_channels, out_channels, norm="instance_affine", bias=True),
    )


class VFAEncoder(Encoder):
    """A U-Net on one image whose up-arm gives the maps; the same weights serve moving and fixed image.

    The image is instance-normalised first. With the default arguments the maps have 16, 32, 64, 64 and 64 channels at
    strides 1 to 16.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        start_channels: channels of the first convolution; level ``i`` has ``start_channels * 2**(i + 1)``.
        max_channels: no level has more.
        downsamples: number of halvings.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        start_channels: int = 8,
        max_channels: int = 64,
        downsamples: int = 4,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.pairing = spatial_dims, in_channels, "separate"
        widths = tuple(min(max_channels, start_channels * 2 ** (i + 1)) for i in range(downsamples + 1))
        self.feature_channels = widths
        self.strides = tuple(2**i for i in range(downsamples + 1))
        self.normalize = InstanceNorm(in_channels, affine=True)
        self.stem = convolution(spatial_dims, in_channels, start_channels)
        self.pool = Pool[Pool.AVG, spatial_dims](2)
        inputs = (start_channels, *widths[:-1])
        self.down = nn.ModuleList(_double(spatial_dims, a, b) for a, b in zip(inputs, widths, strict=True))
        pairs = list(zip(widths[1:], widths[:-1], strict=True))
        self.rise = nn.ModuleList(ConvUnit(spatial_dims, a, b, norm="instance_affine", bias=True) for a, b in pairs)
        self.up = nn.ModuleList(_double(spatial_dims, 2 * b, b) for _, b in pairs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_channels, *S) to maps at strides 1, 2, 4, ..."""
        x = F.leaky_relu(self.stem(self.normalize(x)), _SLOPE)
        skips = []
        for i, block in enumerate(self.down):
            x = block(self.pool(x) if i else x)
            skips.append(x)
        features = [skips.pop()]
        mode = "bilinear" if self.spatial_dims == 2 else "trilinear"
        for rise, block in zip(reversed(self.rise), reversed(self.up), strict=True):
            skip = skips.pop()
            # Corner on corner, as a level's field is enlarged by the network that these features were made for.
            x = F.interpolate(features[0], size=skip.shape[2:], mode=mode, align_corners=True)
            features.insert(0, block(torch.cat((rise(x), skip), dim=1)))
        return features
