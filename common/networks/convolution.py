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
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from common.spatial.exporting import exporting

__all__ = ["convolution", "convolve"]

# PyTorch gives a float32 volume of one item and at most this many numbers in a plane across the last axis
# (B * C * S_0 * S_1) to a loop that unfolds it, and everything else to oneDNN, which is up to eight times faster.
_SMALL = 20480
# With fewer channels the loop wins.
_MIN_CHANNELS = 8
# Half-precision weight gradients of the CPU library hold uninitialised numbers on maps of a few voxels (seen up to 32).
_TINY = 128


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, ...] = 1,
) -> Tensor:
    """Convolution of (B, C, *S), with a way around what the CPU library does badly in three dimensions.

    One small volume runs as a batch of two, of which the second is dropped; maps of a few voxels are convolved in
    float32 under autocast.

    Args:
        x: (B, C, *S), two or three axes.
        weight: (out, C, *kernel).
        bias: (out,) or None.
        stride: of every axis.
        padding: zeros at both ends of every axis, one number or one an axis.
    """
    if x.ndim == 4:
        return F.conv2d(x, weight, bias, stride, padding)
    if exporting():
        return F.conv3d(x, weight, bias, stride, padding)
    if x.device.type == "cpu" and x.shape[2:].numel() <= _TINY and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            exact = convolve(x.float(), weight, bias, stride=stride, padding=padding)
        return exact.to(torch.get_autocast_dtype("cpu"))
    small = x.shape[0] == 1 and x.shape[1] >= _MIN_CHANNELS and x.shape[:-1].numel() <= _SMALL
    if small and stride == 1 and x.device.type == "cpu" and x.dtype == torch.float32:
        return F.conv3d(x.expand(2, -1, -1, -1, -1), weight, bias, stride, padding)[:1]
    return F.conv3d(x, weight, bias, stride, padding)


class _Conv3d(nn.Conv3d):
    """``nn.Conv3d`` by :func:`convolve`; the same state dict."""

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of (B, C, *S)."""
        return convolve(input, self.weight, self.bias, stride=self.stride[0], padding=self.kernel_size[0] // 2)


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
