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
"""SITReg: symmetric registration with an inverse, by an encoder and heads of plain convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from common.networks import Encoder, average_pool, convolution, convolve

from .pyramid import DualStreamPyramid

__all__ = ["SITReg", "SITRegEncoder", "SITRegHead"]

_LARGE = 2**20  # features, from which on a head works on one side after the other where no gradient is wanted


class _Unit(nn.Module):
    """Convolution k3, group normalisation, ReLU.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        groups: of the normalisation.

    Raises:
        ValueError: when the channels do not divide into the groups.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        if out_channels % groups:
            raise ValueError(f"every number of channels must be a multiple of the {groups} groups, got {out_channels}")
        self.conv = convolution(spatial_dims, in_channels, out_channels)
        self.norm = nn.GroupNorm(groups, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, *S) to (B, out_channels, *S)."""
        return self.activate(self.conv(x))

    def activate(self, x: Tensor) -> Tensor:
        """What follows the convolution."""
        return F.relu_(self.norm(x))


class _DownStage(nn.Module):
    """Halve the grid by a convolution, add the projected mean of what by-passed the level, two units.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels in.
        out_channels: channels out.
        groups: of the normalisation.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.down = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 2, stride=2)
        self.projection = convolution(spatial_dims, in_channels, out_channels, 1)
        self.units = _two_units(spatial_dims, out_channels, out_channels, groups)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Map and by-pass (B, in_channels, *S) to those of the next level, (B, out_channels, *S / 2)."""
        skip = self.down(x) + self.projection(average_pool(skip, 2))
        return self.units(skip), skip


class SITRegEncoder(Encoder):
    """SITReg's features of one image.

    A 1x1 projection and two units (convolution, group normalisation, ReLU) on the image grid; then, a level, a
    convolution k2 s2, to which the average-pooled and projected input of the last level's units is added, and two
    units.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        channels: of each level, fine to coarse, multiples of ``groups``.
        groups: of the normalisation.

    Raises:
        ValueError: when channels do not divide into the groups.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        channels: Sequence[int] = (12, 32, 64, 128, 128, 128),
        groups: int = 4,
    ) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.pairing = spatial_dims, in_channels, "separate"
        self.feature_channels = tuple(channels)
        self.strides = tuple(2**level for level in range(len(channels)))
        self.projection = convolution(spatial_dims, in_channels, channels[0], 1)
        self.units = _two_units(spatial_dims, channels[0], channels[0], groups)
        self.stages = nn.ModuleList(_DownStage(spatial_dims, a, b, groups) for a, b in pairwise(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (B, in_channels, *S) to maps at strides 1, 2, 4, ..."""
        skip = self.projection(x)
        features = [self.units(skip)]
        for stage in self.stages:
            x, skip = stage(features[-1], skip)
            features.append(x)
        return features


class SITRegHead(nn.Module):
    """Motion between two maps a and b as seen from either side: from cat(a - b, a + b) and from cat(b - a, a + b).

    Two units and a convolution k1 with PyTorch's initial weights. The first convolution is linear: its parts for the
    sum and for the difference serve both sides, with the signs of the latter exchanged, which takes half of the
    multiplications and gives exchanged images exactly the exchanged motions.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of a and of b together.
        channels: of the units, a multiple of ``groups``.
        groups: of the normalisation.

    Raises:
        ValueError: when channels do not divide into the groups.
    """

    def __init__(self, spatial_dims: int, in_channels: int, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.units = _two_units(spatial_dims, in_channels, channels, groups)
        self.flow = convolution(spatial_dims, channels, spatial_dims, 1)

    def both(self, total: Tensor, difference: Tensor) -> Tensor:
        """Motion seen from either side, one after the other: (2B, d, *S), float32.

        Args:
            total: a + b, (B, in_channels / 2, *S).
            difference: a - b, of the same shape.
        """
        first = self.units[0].conv
        for_difference, for_total = first.weight.chunk(2, dim=1)
        even, odd = convolve(total, for_total, first.bias), convolve(difference, for_difference)
        if total.numel() >= _LARGE and not torch.is_grad_enabled():
            sides = [even + odd, even.sub_(odd)]
            del even, odd
            return torch.cat([self._motion(sides.pop(0)) for _ in range(2)])
        return self._motion(torch.cat((even + odd, even - odd)))

    def _motion(self, x: Tensor) -> Tensor:
        """All that follows the first convolution."""
        x = self.units[1](self.units[0].activate(x))
        with torch.autocast(x.device.type, enabled=False):
            motion: Tensor = self.flow(x.float())
        return motion


class SITReg(DualStreamPyramid):
    """Registration with inverse, exchanged when the images are: SITReg's encoder and heads in the pyramid's algorithm.

    With the default channels this is SITReg-v1 of the LUMIR challenge: six levels, 15,076,110 parameters, motions of
    each level bounded such that no field can fold. What :class:`InverseConsistentDecoder` says of the algorithm holds
    here too; the coarsest level stands for blocks of 32 voxels, to a multiple of which images are padded.
    ``fields`` gives "ddf", "inverse_ddf", "inversion_iterations" and "inversion_residual", and if asked for, "pyramid"
    and "inverse_pyramid"; see :class:`DualStreamPyramid`.
    Source: Honkamaa and Marttinen, SITReg (2023), configuration "very deep heavy".

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        channels: of the encoder's levels, fine to coarse; their number is that of the levels.
        head_channels: of the heads, fine to coarse.
        groups: of the normalisation; every number of channels is a multiple of it.
        pyramid: give the fields of all levels.
        decoder_options: further options of :class:`InverseConsistentDecoder`, such as ``checkpoint_heads``.

    Raises:
        ValueError: when channels do not divide into the groups, or there is not one number of head channels a level.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        *,
        channels: Sequence[int] = (12, 32, 64, 128, 128, 128),
        head_channels: Sequence[int] = (12, 64, 128, 256, 256, 256),
        groups: int = 4,
        pyramid: bool = False,
        decoder_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            spatial_dims,
            "convic_mf",
            encoder=SITRegEncoder(spatial_dims, in_channels, channels, groups),
            decoder_channels=head_channels,
            pyramid=pyramid,
            decoder_options=decoder_options,
        )
        pairs = zip(channels, head_channels, strict=True)
        self.decoder.heads = nn.ModuleList(SITRegHead(spatial_dims, 2 * f, c, groups) for f, c in pairs)


def _two_units(spatial_dims: int, in_channels: int, out_channels: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        _Unit(spatial_dims, in_channels, out_channels, groups), _Unit(spatial_dims, out_channels, out_channels, groups)
    )
