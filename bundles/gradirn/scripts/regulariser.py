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
"""The learned part of a step: a small convolutional network from the field and the images to an update."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from common.networks import convolution

from .convolution import channels_last, convolve_leaky

__all__ = ["Regulariser", "init_leaky"]

SLOPE = 0.2


class Regulariser(nn.Module):
    """Convolutions k3 with leaky ReLUs in between, at one resolution; the last one starts at zero.

    An untrained regulariser therefore gives no update at all, and the network is plain gradient descent. With the last
    layer as large as the others it would feed an arbitrary field back into itself in every step.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the field and of the images that come with it.
        channels: of the layers in between.
        layers: convolutions, at least 2.

    Raises:
        ValueError: when there are fewer than two layers.
    """

    def __init__(self, spatial_dims: int, in_channels: int, channels: int = 32, layers: int = 5) -> None:
        super().__init__()
        if layers < 2:
            raise ValueError(f"a regulariser needs at least 2 layers, got {layers}")
        widths = [in_channels] + [channels] * (layers - 1)
        self.hidden = nn.ModuleList(init_leaky(convolution(spatial_dims, a, b)) for a, b in pairwise(widths))
        self.last = convolution(spatial_dims, channels, spatial_dims)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, *S) to an update (B, d, *S), in the precision that autocast asks for."""
        x = channels_last(x)
        for conv in self.hidden:
            x = convolve_leaky(conv, x, SLOPE)
        return convolve_leaky(self.last, x, 1.0).contiguous()


def init_leaky(conv: nn.Module) -> nn.Module:
    """Draw a convolution's weights as He et al. (2015) do for the leaky ReLU that follows it; biases stay."""
    weight = conv.weight
    assert isinstance(weight, Tensor)
    nn.init.kaiming_uniform_(weight, a=SLOPE, nonlinearity="leaky_relu")
    return conv
