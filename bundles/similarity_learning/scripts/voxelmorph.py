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
"""The VoxelMorph that variational registration was compared with, and that can start it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from common.networks import VoxelMorph, crop_to
from common.spatial import integrate, resample_field

__all__ = ["PublishedVoxelMorph"]


class PublishedVoxelMorph(VoxelMorph):
    """VoxelMorph as it was trained with a baseline or a learnt similarity: 301 411 parameters in 3-D.

    The velocity is integrated on a grid of half the size whose outermost voxels are those of the image
    (align_corners=True), with zeros outside; the way down multiplies by 0.5 and the way up by 2. That is what the
    authors' VoxelMorph did (of January 2021), so their weights give their fields. The geometry asks for
    (n/2 - 1)/(n - 1) and its inverse: in between the flow is faster by a voxel's share of the image, and what comes out
    is as much slower.

    ``fields`` gives "ddf", "velocity" (both on the image grid) and "half_velocity", what is integrated, which their
    smoothness term is of.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        integration_steps: squarings.
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 2, integration_steps: int = 12) -> None:
        super().__init__(spatial_dims, in_channels, integration_steps=integration_steps, half_resolution=True)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        size = image.shape[2:]
        velocity = self.head(self.unet(self.padded(image, max(self.unet.encoder.strides))))
        padded = velocity.shape[2:]
        half = resample_field(velocity, [n // 2 for n in padded], align_corners=True, scale=0.5)
        ddf = resample_field(
            integrate(half, self.integration_steps, padding="zeros"), padded, align_corners=True, scale=2.0
        )
        return {"ddf": crop_to(ddf, size), "velocity": crop_to(velocity, size), "half_velocity": half}
