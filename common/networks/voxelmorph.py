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
"""VoxelMorph: the convolutional U-Net (Balakrishnan et al., 2019), its encoder, and the registration network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks.base import (
    Encoder,
    RegistrationNetwork,
    crop_to,
)
from common.networks.blocks import FlowHead
from common.networks.convolution import convolution
from common.spatial import integrate, resample_field

__all__ = ["VoxelMorph", "VoxelMorphEncoder", "VoxelMorphUNet"]

_SLOPE = 0.2


class VoxelMorphEncoder(Encoder):
    """The down-arm of VoxelMorph's U-Net: one strided convolution and a leaky ReLU a level, strides 2, 4, 8, ...

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        channels: channels of each level, fine to coarse.
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 2, channels: Sequence[int] = (16, 32, 32, 32)) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.pairing = spatial_dims, in_channels, "joint"
        self.feature_channels = tuple(channels)
        self.strides = tuple(2 ** (i + 1) for i in range(len(channels)))
        widths = [in_channels, *channels]
        self.convs = nn.ModuleList(convolution(spatial_dims, a, b, stride=2) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Pair (B, in_channels, *S) to maps at strides 2, 4, ..."""
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), _SLOPE)
            features.append(x)
        return features


class VoxelMorphUNet(nn.Module):
    """VoxelMorph's U-Net: from a pair to features on the image grid.

    Encoder as ``VoxelMorphEncoder``; a decoder of convolution, nearest-neighbour doubling and skip; then convolutions
    at full resolution, the first of which also sees the images.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        encoder_channels: channels of the down-arm, fine to coarse.
        decoder_channels: channels of the convolutions of the up-arm, coarse to fine, as many as the down-arm has, and
            then of those at full resolution.

    Raises:
        ValueError: when the up-arm has no convolution at full resolution.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        encoder_channels: Sequence[int] = (16, 32, 32, 32),
        decoder_channels: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
    ) -> None:
        super().__init__()
        depth = len(encoder_channels)
        if len(decoder_channels) <= depth:
            raise ValueError(f"decoder_channels needs more than {depth} numbers, got {tuple(decoder_channels)}")
        self.encoder = VoxelMorphEncoder(spatial_dims, in_channels, encoder_channels)
        skips = [*reversed(encoder_channels[:-1]), in_channels]
        width = encoder_channels[-1]
        self.decoder = nn.ModuleList()
        for out, skip in zip(decoder_channels[:depth], skips, strict=True):
            self.decoder.append(convolution(spatial_dims, width, out))
            width = out + skip
        self.full = nn.ModuleList()
        for out in decoder_channels[depth:]:
            self.full.append(convolution(spatial_dims, width, out))
            width = out
        self.out_channels = width

    def forward(self, x: Tensor) -> Tensor:
        """Pair (B, in_channels, *S) to (B, out_channels, *S)."""
        features = self.encoder(x)
        skips = [*reversed(features[:-1]), x]
        y = features[-1]
        for conv, skip in zip(self.decoder, skips, strict=True):
            y = F.interpolate(F.leaky_relu(conv(y), _SLOPE), size=skip.shape[2:], mode="nearest")
            y = torch.cat((y, skip), dim=1)
        for conv in self.full:
            y = F.leaky_relu(conv(y), _SLOPE)
        return y


class VoxelMorph(RegistrationNetwork):
    """VoxelMorph: U-Net, flow head, and scaling and squaring.

    ``fields`` gives "ddf" and, when it integrates, "velocity".

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        encoder_channels: down-arm, fine to coarse.
        decoder_channels: up-arm and full resolution, see ``VoxelMorphUNet``.
        integration_steps: squarings; 0 makes the output a plain displacement.
        half_resolution: integrate on a grid of half the size, eight times cheaper in 3-D. The velocity is halved on the
            way down and the displacement doubled on the way up, since both count voxels of their grid (MONAI's
            ``half_res`` does the reverse).
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        encoder_channels: Sequence[int] = (16, 32, 32, 32),
        decoder_channels: Sequence[int] = (32, 32, 32, 32, 32, 16, 16),
        integration_steps: int = 7,
        half_resolution: bool = False,
    ) -> None:
        super().__init__(spatial_dims)
        self.unet = VoxelMorphUNet(spatial_dims, in_channels, encoder_channels, decoder_channels)
        self.head = FlowHead(spatial_dims, self.unet.out_channels)
        self.integration_steps = integration_steps
        self.half_resolution = half_resolution

    def _exp(self, velocity: Tensor) -> Tensor:
        if not self.half_resolution:
            return integrate(velocity, self.integration_steps)
        size = velocity.shape[2:]
        half = resample_field(velocity, [(n + 1) // 2 for n in size], align_corners=False)
        return resample_field(integrate(half, self.integration_steps), size, align_corners=False)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        size = image.shape[2:]
        flow = self.head(self.unet(self.padded(image, max(self.unet.encoder.strides))))
        if self.integration_steps == 0:
            return {"ddf": crop_to(flow, size)}
        return {"ddf": crop_to(self._exp(flow), size), "velocity": crop_to(flow, size)}
