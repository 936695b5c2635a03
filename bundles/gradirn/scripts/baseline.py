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
"""The U-Net that GraDIRN was compared with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from common.networks import FlowHead, RegistrationNetwork, VoxelMorphUNet, convolution, crop_to

from .regulariser import SLOPE, init_leaky

__all__ = ["VoxelMorphBaseline"]


class VoxelMorphBaseline(RegistrationNetwork):
    """The published baseline "vm": VoxelMorph's U-Net with a convolution of its own at full resolution, no integration.

    ``fields`` gives "ddf". It starts near zero, as all networks here do.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 2) -> None:
        super().__init__(spatial_dims)
        self.first = convolution(spatial_dims, in_channels, 16)
        self.unet = VoxelMorphUNet(spatial_dims, 16, (32, 32, 32, 32), (32, 32, 32, 32, 16, 16))
        for conv in (self.first, *self.unet.encoder.convs, *self.unet.decoder, *self.unet.full):
            init_leaky(conv)
        self.head = FlowHead(spatial_dims, self.unet.out_channels)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        x = F.leaky_relu(self.first(self.padded(image, max(self.unet.encoder.strides))), SLOPE, inplace=True)
        return {"ddf": crop_to(self.head(self.unet(x)), image.shape[2:])}
