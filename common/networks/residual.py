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
"""The residual block of the dual-stream pyramid's encoder and decoders."""

from __future__ import annotations

from torch import Tensor, nn

from common.networks.blocks import InstanceNorm
from common.networks.convolution import convolution
from common.networks.normalization import normalize_and_activate
from common.networks.slabs import is_large, residual_by_slabs

__all__ = ["ResidualBlock", "initialize"]

_SLOPE = 0.2


class ResidualBlock(nn.Module):
    """Two convolutions and a projected skip, each instance-normalised, summed before the last activation.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        stride: of the first convolution and of the skip.

    Attributes:
        slope: of the leaky ReLUs.
    """

    slope = _SLOPE

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, stride=stride)
        self.norm1 = InstanceNorm(out_channels, affine=True)
        self.conv2 = convolution(spatial_dims, out_channels, out_channels)
        self.norm2 = InstanceNorm(out_channels, affine=True)
        self.skip = convolution(spatial_dims, in_channels, out_channels, 1, stride=stride)
        self.skip_norm = InstanceNorm(out_channels, affine=True)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, *S) to (B, out_channels, *S / stride)."""
        if is_large(x, self.conv1.in_channels):
            return residual_by_slabs(self, lambda first, last: x[:, :, first:last], x.shape[2:])[0]
        y = normalize_and_activate((self.conv1(x), self.norm1), slope=self.slope, overwrite=True)
        y = self.conv2(y)
        branches = (y, self.norm2), (self.skip(x), self.skip_norm)
        return normalize_and_activate(*branches, slope=self.slope, overwrite=True)


def initialize(module: nn.Module) -> None:
    """Kaiming weights for leaky ReLUs in every convolution of a module, and no bias."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(layer.weight, a=_SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
