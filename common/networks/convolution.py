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

"""Convolutions that stay fast on one small volume on a CPU."""

from __future__ import annotations

import torch
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

__all__ = ["convolution"]

# PyTorch gives a float32 volume of one item and at most this many numbers in a plane across the last axis
# (B * C * S_0 * S_1) to a loop that unfolds it, and everything else to oneDNN, which is up to eight times faster.
_SMALL = 20480
# With fewer channels the loop wins.
_MIN_CHANNELS = 8


class _Conv3d(nn.Conv3d):
    """``nn.Conv3d`` that runs one small volume on a CPU as a batch of two and drops the second result."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of (B, C, *S)."""
        small = input.shape[0] == 1 and input.shape[1] >= _MIN_CHANNELS and input.shape[:-1].numel() <= _SMALL
        if small and input.device.type == "cpu" and input.dtype == torch.float32 and self.stride[0] == 1:
            return super().forward(input.expand(2, -1, -1, -1, -1))[:1]
        return super().forward(input)


def convolution(
    spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1, bias: bool = True
) -> nn.Module:
    """A convolution with an odd kernel that keeps the size (divided by ``stride``).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        kernel_size: odd.
        stride: of every axis.
        bias: add a bias.
    """
    kind = _Conv3d if spatial_dims == 3 else Conv[Conv.CONV, spatial_dims]
    return kind(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)
