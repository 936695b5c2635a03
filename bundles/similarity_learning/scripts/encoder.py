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
"""The network of a learnt similarity: features of one image, at its own resolution, added up to a single map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

__all__ = ["FeatureEncoder"]

# What the initialisation leaves of the random weights around the centre, and of those that are 0 or 1 otherwise.
_TINY = 1e-7


class FeatureEncoder(nn.Module):
    """Convolutions that keep the size, each with a leaky ReLU, and a weighted sum of the last features.

    The network of Grzech et al., "A variational Bayesian method for similarity learning in non-rigid image
    registration", CVPR 2022. It begins as the identity (:meth:`dirac_`), so a similarity that it is part of begins as
    the plain one.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of the images.
        channels: features after each convolution.
        slope: of the leaky ReLU for negative numbers.
    """

    def __init__(
        self, spatial_dims: int = 3, in_channels: int = 1, channels: Sequence[int] = (4, 8, 8), slope: float = 0.2
    ) -> None:
        super().__init__()
        self.slope = slope
        kind, widths = Conv[Conv.CONV, spatial_dims], [in_channels, *channels]
        self.convolutions = nn.ModuleList(kind(i, o, 3) for i, o in pairwise(widths))
        self.aggregation = kind(widths[-1], 1, 1, bias=False)
        self.dirac_()

    @torch.no_grad()
    def dirac_(self) -> None:
        """Begin as the identity for images of no negative numbers (and one channel).

        Of each input channel every output takes a random share at the kernel's centre; the shares add up to 1, and the
        last sum adds all up again. Everything else is about 1e-7, so that no two features are alike in training.
        """
        for conv in self.convolutions:
            conv.reset_parameters()
            conv.weight.mul_(_TINY)
            shares = torch.rand_like(conv.weight[(...,) + (1,) * (conv.weight.ndim - 2)])
            conv.weight[(...,) + (1,) * (conv.weight.ndim - 2)] = shares / shares.sum(0)
            conv.bias.normal_(std=_TINY)
        self.aggregation.weight.normal_(1.0, _TINY)

    def forward(self, image: Tensor) -> Tensor:
        """The map (B, 1, *S) of images (B, C, *S), float32."""
        x, pads = image, (1,) * (2 * (image.ndim - 2))
        for conv in self.convolutions:
            x = F.leaky_relu(conv(F.pad(x, pads, mode="replicate")), self.slope)
        return self.aggregation(x).float()
