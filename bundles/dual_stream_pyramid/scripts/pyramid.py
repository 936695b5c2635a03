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
"""The dual-stream pyramid: one encoder on both images, and one of six decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.networks import DualStreamEncoder, Encoder, RegistrationNetwork, crop_to, split_pair

from .composition import AttentionStep, CompositionDecoder, ConvolutionStep
from .inverse_consistent import InverseConsistentDecoder

__all__ = ["DECODERS", "DualStreamPyramid"]

# Pairs of more voxels are encoded one image after the other if nothing is kept for a backward pass.
_LARGE = 2**20


def _convolutions(match: str) -> Callable[..., nn.Module]:
    def build(dims: int, features: Sequence[int], channels: Sequence[int], radius: int = 1) -> nn.Module:
        pairs = zip(features, channels, strict=True)
        return CompositionDecoder(ConvolutionStep(dims, f, c, match=match, radius=radius) for f, c in pairs)

    return build


def _attention(dims: int, features: Sequence[int], channels: Sequence[int], radius: int = 1) -> nn.Module:
    return CompositionDecoder(AttentionStep(dims, f, f, radius=radius) for f in features)


def _inverse_consistent(inputs: str) -> Callable[..., nn.Module]:
    def build(dims: int, features: Sequence[int], channels: Sequence[int], **options: Any) -> nn.Module:
        return InverseConsistentDecoder(dims, features, channels, inputs=inputs, **options)

    return build


#: What builds a decoder, by name: called with spatial dims, channels of the features and of the heads, and its options.
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "conv_mf": _convolutions("mf"),
    "conv_mfc": _convolutions("mfc"),
    "conv_c": _convolutions("c"),
    "convic_mf": _inverse_consistent("mf"),
    "convic_c": _inverse_consistent("c"),
    "vfa": _attention,
}


class DualStreamPyramid(RegistrationNetwork):
    """Registration by a pyramid of features of either image, and a decoder that compares them from coarse to fine.

    ``fields`` gives "ddf"; with an inverse-consistent decoder also "inverse_ddf" (from moving to fixed),
    "inversion_iterations" and "inversion_residual"; and if asked for, "pyramid" (and "inverse_pyramid"): lists of the
    fields after each level on the image grid, coarse to fine, for deep supervision.
    Source: Unsupervised-DL-DIR-Revisited, whose DP-Conv-MF, -MFC, -C, DP-ConvIC-MF, -C and DP-VFA these are.

    Args:
        spatial_dims: 2 or 3.
        decoder: "conv_mf", "conv_mfc" and "conv_c" predict a level's step by convolutions on the two feature maps, on
            these and their local correlation, or on the correlation alone; "convic_mf" and "convic_c" do the same for
            both directions at once, with inverses; "vfa" has vector field attention instead.
        in_channels: channels of one image.
        encoder: of one image, strides from 1; by default a ``DualStreamEncoder``.
        encoder_channels: of the default encoder, fine to coarse.
        decoder_channels: of the heads, fine to coarse ("vfa" has none).
        pyramid: give the fields of all levels.
        decoder_options: further options of the decoder, such as ``radius`` of the correlation or the attention, or
            those of ``InverseConsistentDecoder``.

    Raises:
        ValueError: on an unknown decoder (the known ones are listed), or an encoder that takes the pair as one image.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        decoder: str = "conv_c",
        in_channels: int = 1,
        *,
        encoder: Encoder | None = None,
        encoder_channels: Sequence[int] = (16, 32, 32, 64, 64),
        decoder_channels: Sequence[int] = (32, 64, 64, 128, 128),
        pyramid: bool = False,
        decoder_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(spatial_dims)
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {sorted(DECODERS)}, got {decoder!r}")
        self.encoder = DualStreamEncoder(spatial_dims, in_channels, encoder_channels) if encoder is None else encoder
        if self.encoder.pairing != "separate":
            raise ValueError(f"{type(self.encoder).__name__} sees both images at once; a pyramid of either is needed")
        features = self.encoder.feature_channels
        self.decoder = DECODERS[decoder](spatial_dims, features, decoder_channels, **(decoder_options or {}))
        self.pyramid = pyramid

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        padded, size = self.padded(image, max(self.encoder.strides)), image.shape[2:]
        # The lists are the decoder's, which lets go of a level's maps as soon as it may.
        found = self.decoder(*self._encode(padded), padded.shape[2:], pyramid=self.pyramid, release=True)
        for name in ("ddf", "inverse_ddf"):
            if name in found:
                found[name] = crop_to(found[name], size)
        for name in ("pyramid", "inverse_pyramid"):
            if name in found:
                found[name] = [crop_to(field, size) for field in found[name]]
        return found

    def _encode(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of moving and fixed image, fine to coarse."""
        pair = split_pair(image, self.spatial_dims)
        if not torch.is_grad_enabled() and image[:, 0].numel() > _LARGE:
            moving, fixed = (list(self.encoder(one)) for one in pair)
            return moving, fixed
        levels = [level.chunk(2) for level in self.encoder(torch.cat(pair))]
        return [moving for moving, _ in levels], [fixed for _, fixed in levels]
