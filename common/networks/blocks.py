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
"""Convolution units and the upsampling stage that the decoders are built of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Norm
from torch import Tensor, nn

from common.networks.convolution import convolution, convolve

__all__ = ["ConvUnit", "FlowHead", "InstanceNorm", "UpStage", "upsample_to"]


def upsample_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (B, C, *S) to ``size``, voxel areas aligned (align_corners=False)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear" if x.ndim == 4 else "trilinear", align_corners=False)


class InstanceNorm(nn.Module):
    """Instance normalisation that also takes a map of one voxel, where the centred value is zero.

    PyTorch's own raises there, which would forbid images of one coarsest voxel.

    Args:
        channels: number of channels.
        affine: learn a scale and a shift a channel.
    """

    def __init__(self, channels: int, affine: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel of every item of (B, C, *S)."""
        if x.shape[2:].numel() > 1:
            return F.instance_norm(x, weight=self.weight, bias=self.bias)
        centred = x - x
        if self.weight is None or self.bias is None:
            return centred
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return centred * self.weight.view(shape) + self.bias.view(shape)


def _norm(name: str, channels: int, spatial_dims: int) -> nn.Module:
    if name == "instance":
        return InstanceNorm(channels)
    if name == "instance_affine":
        return InstanceNorm(channels, affine=True)
    if name == "batch":
        batch_norm: nn.Module = Norm[Norm.BATCH, spatial_dims](channels)
        return batch_norm
    raise ValueError(f"norm must be 'instance', 'instance_affine' or 'batch', got '{name}'")


class ConvUnit(nn.Module):
    """Convolution k3, normalisation, leaky ReLU, or the last two in the other order.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        norm: "instance" (no affine part), "instance_affine" or "batch". Batch statistics of one pair differ from the
            running ones used later, so at batch size 1 instance normalisation is the sound choice.
        bias: a bias in the convolution; useless before a norm, which takes it away again.
        slope: of the leaky ReLU.
        activation_first: put the leaky ReLU before the norm. May be changed later.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        norm: str = "instance",
        bias: bool = False,
        slope: float = 0.01,
        activation_first: bool = False,
    ) -> None:
        super().__init__()
        self.conv = convolution(spatial_dims, in_channels, out_channels, bias=bias)
        self.norm = _norm(norm, out_channels, spatial_dims)
        self.slope = slope
        self.activation_first = activation_first

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """(B, in_channels, *S) to (B, out_channels, *S); several maps count as one that holds the channels of all.

        They are not put together, which would copy them and keep the copy for the backward pass.
        """
        if more:
            x = self._convolved_in_turn(x, *more)
        else:
            x = self.conv(x)
        # In place, as no derivative needs what is overwritten: a leaky ReLU's is told by its result.
        if self.activation_first:
            normalised: Tensor = self.norm(F.leaky_relu_(x, self.slope))
            return normalised
        return F.leaky_relu_(self.norm(x), self.slope)

    def _convolved_in_turn(self, *maps: Tensor) -> Tensor:
        weights = self.conv.weight.split([x.shape[1] for x in maps], dim=1)
        total = convolve(maps[0], weights[0], self.conv.bias)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            total = total.add_(convolve(x, weight))
        return total


class UpStage(nn.Module):
    """Upsample to the size of the skip, concatenate it, two convolution units with instance normalisation.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the coarse map.
        skip_channels: channels of the skip.
        out_channels: channels out.
    """

    def __init__(self, spatial_dims: int, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvUnit(spatial_dims, in_channels + skip_channels, out_channels)
        self.conv2 = ConvUnit(spatial_dims, out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Coarse map (B, in_channels, *s) and skip (B, skip_channels, *S) to (B, out_channels, *S)."""
        upsampled = upsample_to(x, skip.shape[2:])
        return self.conv2(self.conv1(upsampled, skip))


class FlowHead(nn.Module):
    """Convolution k3 to a field, in float32 whatever autocast says, near zero before training.

    Args:
        spatial_dims: 2 or 3; also the number of channels out.
        in_channels: channels in.
        std: standard deviation of the initial weights.
        bias: initial bias.
    """

    def __init__(self, spatial_dims: int, in_channels: int, *, std: float = 1e-5, bias: float = 0.0) -> None:
        super().__init__()
        self.conv = convolution(spatial_dims, in_channels, spatial_dims)
        nn.init.normal_(self.conv.weight, std=std)
        nn.init.constant_(self.conv.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, in_channels, *S) to a field (B, spatial_dims, *S) in float32."""
        with torch.autocast(x.device.type, enabled=False):
            field: Tensor = self.conv(x.float())
        return field
