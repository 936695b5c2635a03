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
"""TransMorphSPR: a field, and how strongly it is to be smoothed at each voxel.

Source: Chen et al., arXiv 2412.17982 (Medical Image Analysis 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.losses.checks import check_choice
from common.networks import ConvUnit, SwinEncoder, TransMorphTVF, convolution, crop_to, upsample_to

__all__ = ["TransMorphSPR", "WeightHead"]

_LEAST = 1e-6  # of a weight, whose logarithm is taken


class WeightHead(nn.Module):
    """Features under the flow heads to regularisation weights in [1e-6, 1].

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        hidden_channels: of the two layers between.
        norm: of these, "instance" or "batch".
        upsample: what is interpolated to a finer grid, "logit" or "prob".

    Raises:
        ValueError: for another norm or upsampling.
    """

    def __init__(self, spatial_dims: int, in_channels: int, hidden_channels: int, *, norm: str, upsample: str) -> None:
        super().__init__()
        check_choice("WeightHead", "upsample", upsample, ("logit", "prob"))
        self.hidden = nn.ModuleList(
            ConvUnit(spatial_dims, channels, hidden_channels, norm=norm) for channels in (in_channels, hidden_channels)
        )
        self.last = convolution(spatial_dims, hidden_channels, 1)
        self.upsample = upsample

    def forward(self, features: Tensor, size: Sequence[int]) -> Tensor:
        """Features (B, in_channels, *s) to weights (B, 1, *size) in float32, whatever autocast says."""
        for unit in self.hidden:
            features = unit(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.last(features.float())
            if self.upsample == "logit":
                return upsample_to(logits, size).sigmoid().clamp_min(_LEAST)
            return upsample_to(logits.sigmoid().clamp_min(_LEAST), size)


class TransMorphSPR(TransMorphTVF):
    """TransMorph with a time-varying decoder and a map of regularisation weights.

    ``forward`` gives the field alone and computes no weight map. ``fields`` gives, on the grid of the image and in its
    voxels, "ddf"; "velocity" (B, d, *S) where the ddf is the exponential of one velocity (``diffeomorphic`` and not
    "composition"); "weight_map" (B, 1, *S) in [1e-6, 1] if ``weight_map``; "inverse_ddf" if ``inverse``. A loss
    smooths the field where the weight is 1, and less where it is smaller.

    Published are ``window_size=(5, 6, 7), norm="batch", update="self_warped"`` for brains of 160 x 192 x 224 voxels;
    batch normalisation of one pair differs between training and use, and that update mixes velocities with
    displacements (see ``TimeSteps``), so both are not the default. Left out is a head that no output depends on there.

    Small enough for CPUs: ``embed_dim=24, depths=(2, 2, 2), num_heads=(4, 4, 4), steps=3``.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of one image.
        embed_dim: channels of the finest level of the transformer; even, and a multiple of the heads.
        depths: blocks of each level, fine to coarse.
        num_heads: attention heads of each level.
        window_size: in patches, one number or one an axis; by default (2, 3, 3) in 3-D and (3, 3) in 2-D. The published
            networks choose it so that a window covers the coarsest level.
        patch_size: voxels of the network's grid, a power of two.
        drop_path: stochastic depth of the last block.
        steps: time steps.
        step_channels: channels under a flow head.
        update: "composition", "addition" or "self_warped", see ``TimeSteps``.
        diffeomorphic: exponentiate velocities.
        integration_steps: squarings of an exponential.
        downsample: average pooling before the network, one factor or one an axis; thick slices may stay: (2, 2, 1).
        norm: of the units that see images and of the weight head, "instance" or "batch".
        weight_upsample: how weights reach the grid of the image: their "logit" is interpolated, or they themselves
            ("prob").
        padding: of images and fields outside the grid, "zeros" or "border".
        weight_map: have a weight head, and ``fields`` give its map. May be set to False later, and back.
        inverse: have ``fields`` give the inverse field; needs ``diffeomorphic``. May be changed later.
        use_checkpoint: recompute transformer blocks and time steps in the backward pass to save memory.

    Raises:
        ValueError: for an unknown choice, or numbers that do not go together.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        channels: int = 1,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (4, 4, 5),
        num_heads: Sequence[int] = (8, 8, 8),
        window_size: int | Sequence[int] | None = None,
        patch_size: int = 4,
        drop_path: float = 0.3,
        steps: int = 7,
        step_channels: int = 16,
        update: str = "composition",
        diffeomorphic: bool = True,
        integration_steps: int = 7,
        downsample: int | Sequence[int] = 2,
        norm: str = "instance",
        weight_upsample: str = "logit",
        padding: str = "zeros",
        weight_map: bool = True,
        inverse: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        encoder = SwinEncoder(
            spatial_dims,
            2 * channels,
            embed_dim,
            depths,
            num_heads,
            window_size,
            patch_size,
            drop_path=drop_path,
            use_checkpoint=use_checkpoint,
        )
        super().__init__(
            encoder,
            channels=channels,
            steps=steps,
            step_channels=step_channels,
            update=update,
            diffeomorphic=diffeomorphic,
            integration_steps=integration_steps,
            downsample=downsample,
            norm=norm,
            padding=padding,
            inverse=inverse,
            use_checkpoint=use_checkpoint,
        )
        self.weight_map = weight_map
        self.weight_head = (
            WeightHead(spatial_dims, step_channels, embed_dim // 2, norm=norm, upsample=weight_upsample)
            if weight_map
            else None
        )

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class.

        Raises:
            ValueError: when a weight map is asked for and the network was built without one, or ``image`` is no pair.
        """
        if self.weight_map and self.weight_head is None:
            raise ValueError("weight_map is True, but the network was built with weight_map=False and has no weights")
        result = super().fields(image)
        features = result.pop("features")
        if self.weight_map and self.weight_head is not None:
            padded = [n * factor for n, factor in zip(features.shape[2:], self.downsample, strict=True)]
            result["weight_map"] = crop_to(self.weight_head(features, padded), image.shape[2:])
        return result
