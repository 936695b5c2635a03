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
"""The network of the pretraining: an encoder with the temporary head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from common.networks import (
    Encoder,
    RegistrationNetwork,
    as_tuple,
    average_pool,
    build_encoder,
    crop_to,
    encode_pair,
    to_image_grid,
)

from .ssl_head import SSLHead

__all__ = ["SSLRegistration"]


class SSLRegistration(RegistrationNetwork):
    """Encoder and multi-level head, from a pair to a displacement field.

    ``fields`` gives "ddf" on the image grid, and what the Kullback-Leibler term takes: "level_mean" and "level_logvar",
    lists of one tensor a level, fine to coarse, and "ensemble_mean" and "ensemble_logvar", all on the head's grid and
    in its voxels. In training the ddf is a sample, in evaluation the mean. The field is a plain displacement, as
    published: no integration.

    Args:
        encoder: an encoder, or the name of one for ``build_encoder``.
        spatial_dims: 2 or 3, when ``encoder`` is a name.
        preset: size of a named encoder, "base" or "small".
        downsample: average pooling before the encoder, one factor or one an axis; 2 as published.
        hidden_channels: of the head.
        encoder_options: further options of a named encoder.

    Raises:
        ValueError: when options are given for an encoder that is already built.
    """

    def __init__(
        self,
        encoder: Encoder | str = "swin",
        spatial_dims: int = 3,
        preset: str = "base",
        *,
        downsample: int | Sequence[int] = 2,
        hidden_channels: int = 16,
        encoder_options: dict[str, Any] | None = None,
    ) -> None:
        if isinstance(encoder, str):
            encoder = build_encoder(encoder, spatial_dims, preset=preset, **(encoder_options or {}))
        elif encoder_options:
            raise ValueError(f"encoder_options {sorted(encoder_options)} have no effect on an encoder that is built")
        super().__init__(encoder.spatial_dims)
        self.downsample = as_tuple(downsample, self.spatial_dims, "downsample")
        self.encoder = encoder
        self.head = SSLHead(encoder, hidden_channels)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Field and distributions of the pair ``image`` (B, 2C, *S); see the class."""
        padded = self.padded(image, [f * max(self.encoder.strides) for f in self.downsample])
        pair = average_pool(padded, self.downsample)
        field, stats = self.head(encode_pair(self.encoder, pair), pair.shape[2:])
        *levels, ensemble = stats
        return {
            "ddf": crop_to(to_image_grid(field, padded.shape[2:]), image.shape[2:]),
            "level_mean": [level.mean for level in levels],
            "level_logvar": [level.logvar for level in levels],
            "ensemble_mean": ensemble.mean,
            "ensemble_logvar": ensemble.logvar,
        }
