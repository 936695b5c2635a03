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
"""VFA: vector field attention on the features of a U-Net, from coarse to fine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.networks import RegistrationNetwork, VFAEncoder, crop_to, split_pair
from common.spatial import compose, identity_grid, resample_field, warp

from .composition import AttentionStep

__all__ = ["VFANetwork"]


class VFANetwork(RegistrationNetwork):
    """The original VFA: Liu et al., "Vector field attention for deformable image registration" (2024).

    At each level, coarse to fine, the moving features are moved by the field so far; a softmax over the products of a
    fixed voxel's features with those of the moving voxels around it gives the mean offset to these, which ``beta``,
    learnt and common to all levels, scales to the step. Fields go to the next level with corner on corner, where their
    values grow by ``(2n - 1) / (n - 1)``. A step that would leave the image ends at its border.
    ``fields`` gives "ddf". With the default channels 2,014,827 parameters.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        start_channels: of the first convolution; level ``i`` has ``start_channels * 2**(i + 1)``, at most
            ``max_channels``.
        matching_channels: of the space in which voxels of the finest level are compared; they double from level to
            level up to ``max_channels``.
        max_channels: no map has more.
        downsamples: number of halvings; images are padded to multiples of ``2**downsamples``.
        radius: of the attention, in voxels of a level.
        initial_beta: what the attention's offsets are multiplied with before training.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        start_channels: int = 8,
        matching_channels: int = 8,
        max_channels: int = 64,
        downsamples: int = 4,
        radius: int = 1,
        initial_beta: float = 0.1,
    ) -> None:
        super().__init__(spatial_dims)
        self.encoder = VFAEncoder(spatial_dims, in_channels, start_channels, max_channels, downsamples)
        self.steps = nn.ModuleList(
            AttentionStep(spatial_dims, c, min(max_channels, matching_channels * 2**level), radius=radius)
            for level, c in enumerate(self.encoder.feature_channels)
        )
        self.beta = nn.Parameter(torch.tensor([float(initial_beta)]))

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        padded, size = self.padded(image, max(self.encoder.strides)), image.shape[2:]
        levels = [level.chunk(2) for level in self.encoder(torch.cat(split_pair(padded, self.spatial_dims)))]
        ddf: Tensor | None = None
        for step, (moving, fixed) in reversed(list(zip(self.steps, levels, strict=True))):
            if ddf is None:
                ddf = self.beta * step(moving, fixed)
                continue
            ddf = resample_field(ddf, fixed.shape[2:], align_corners=True)
            ddf = compose(ddf, _inside(self.beta * step(warp(moving, ddf), fixed)))
        assert ddf is not None
        return {"ddf": crop_to(ddf, size)}


def _inside(ddf: Tensor) -> Tensor:
    """A field (B, d, *S) whose targets beyond the outermost voxels are brought back to these."""
    start = identity_grid(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype)
    last = torch.tensor(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype).view(-1, *(1,) * (ddf.ndim - 2)) - 1
    return (start + ddf).clamp(torch.zeros_like(last), last) - start
