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
"""TransMorph: a Swin transformer that sees both images, and a decoder of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common.networks import ConvUnit, FlowHead, RegistrationNetwork, SwinEncoder, UpStage, crop_to, to_image_grid

__all__ = ["TransMorph"]

_PATCH = 4  # voxels an axis; the decoder ends at half of it


class TransMorph(RegistrationNetwork):
    """TransMorph as the dual-stream pyramid's paper runs it: Chen et al., Medical Image Analysis 2022, OASIS variant.

    A Swin encoder with patches of four voxels; a decoder with skips from the transformer, and from a convolution on the
    images at half resolution; there a convolution gives the field, in voxels of that grid, which is brought to the
    image grid as any field is, its values doubled. ``fields`` gives "ddf".

    The default is the published network, window (5, 6, 7), 46,556,115 parameters. The published count is 46,556,979:
    the difference is a convolution of 864 weights that nothing reads there, and that is left out here. The published
    code enlarges its field without doubling the values; ``convert.py`` halves the last layer, so that the field on the
    image grid is the published one, voxel by voxel.

    That field was trained through a sampler with mixed conventions: it read the moving image at ``(p + u(p)) n / (n -
    1) - 1/2`` along an axis of n voxels, not at ``p + u(p)``, where the published evaluation and everything here reads
    it. Published weights therefore carry an error of up to half a voxel (and the n-th part of the displacement), zero
    at the centre and largest at the border. It depends on the place and on n, so no weight can take it out; a short
    fine-tuning can.

    Small enough for CPUs: ``embed_dim=24, depths=(2, 2, 2), num_heads=(4, 4, 4), window_size=4, head_channels=8``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        embed_dim: channels of the finest level of the transformer; even, and a multiple of the heads.
        depths: blocks of each level, fine to coarse; images are padded to multiples of ``4 * 2**(levels - 1)``.
        num_heads: attention heads of each level.
        window_size: in patches, one number or one an axis; by default (5, 6, 7) in 3-D and (7, 7) in 2-D.
        head_channels: under the flow head.
        mlp_ratio: hidden over input channels of the transformer's MLPs.
        drop_path: stochastic depth of the last block.
        use_checkpoint: recompute the transformer's blocks in the backward pass to save memory.

    Raises:
        ValueError: when depths and heads differ in number, or channels do not divide among heads.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        num_heads: Sequence[int] = (4, 4, 8, 8),
        window_size: int | Sequence[int] | None = None,
        head_channels: int = 16,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.3,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(spatial_dims)
        default = (5, 6, 7) if spatial_dims == 3 else (7, 7)
        self.encoder = SwinEncoder(
            spatial_dims,
            in_channels,
            embed_dim,
            depths,
            num_heads,
            window_size=default if window_size is None else window_size,
            patch_size=_PATCH,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            use_checkpoint=use_checkpoint,
        )
        widths = [*reversed(self.encoder.feature_channels)]
        self.up = nn.ModuleList(UpStage(spatial_dims, a, b, b) for a, b in pairwise(widths))
        self.up.append(UpStage(spatial_dims, embed_dim, embed_dim // 2, head_channels))
        self.image_unit = ConvUnit(spatial_dims, in_channels, embed_dim // 2)
        self.head = FlowHead(spatial_dims, head_channels)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        padded, size = self.padded(image, max(self.encoder.strides)), image.shape[2:]
        pool = F.avg_pool2d if self.spatial_dims == 2 else F.avg_pool3d
        coarse, *finer = reversed(self.encoder(padded))
        for stage, skip in zip(self.up, [*finer, self.image_unit(pool(padded, 3, 2, 1))], strict=True):
            coarse = stage(coarse, skip)
        return {"ddf": crop_to(to_image_grid(self.head(coarse), padded.shape[2:]), size)}
