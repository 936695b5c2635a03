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
"""The network of a learnt similarity: features of one image, at its own resolution, added up to a single map.

The inner loop of the method runs the network forwards and backwards for an image a thousand times with the same
weights. Its derivative then needs no more than the sign of each feature, one byte instead of the feature and its padded
copy. On a CPU, maps lie in memory with their channels last and derivatives are convolutions with mirrored kernels:
PyTorch's own transposed convolutions of so few channels are three times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from common.losses.checks import full_precision

__all__ = ["FeatureEncoder", "channels_last", "fold", "replicate"]

# What the initialisation leaves of the random weights around the centre, and of those that are 0 or 1 otherwise.
_TINY = 1e-7
# oneDNN computes 16 channels even of 4; results over 32 MiB come from memory that is new, and slow, at every call.
_SLAB = 24 * 2**20 // (16 * 4)


class FeatureEncoder(nn.Module):
    """Convolutions that keep the size, each with a leaky ReLU, and a weighted sum of the last features.

    The network of Grzech et al., "A variational Bayesian method for similarity learning in non-rigid image
    registration", CVPR 2022. It begins as the identity (:meth:`dirac_`), so a similarity that it is part of begins as
    the plain one. Images go on beyond their edge with their last value, and so do features.

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
        if not 0.0 < slope <= 1.0:
            raise ValueError(f"FeatureEncoder: slope must be above 0 and at most 1, got {slope}")
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
        """The map (B, 1, *S) of images (B, C, *S), float32 (float64 of float64 images).

        Only first derivatives exist.
        """
        weights = [tensor for conv in self.convolutions for tensor in (conv.weight, conv.bias)]
        result: Tensor = _Encoding.apply(image, self.slope, *weights, self.aggregation.weight)
        return result


class _Encoding(torch.autograd.Function):
    """The whole network. Keeps the features where weights are learnt, their signs where only the image is."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, slope: float, *weights: Tensor) -> Tensor:
        kind, learns = image.device.type, any(ctx.needs_input_grad[2:])
        # Under autocast in half precision. The backward pass may run under another setting, so types are cast here.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights[0].dtype
        ctx.slope, ctx.learns, ctx.dtype, ctx.given = slope, learns, dtype, image.dtype
        kept = []
        with full_precision(image.device):
            x = image.to(dtype)
            if learns:
                kept.append(x)
            for weight, bias in zip(weights[:-1:2], weights[1::2], strict=True):
                x = F.leaky_relu_(_convolve(replicate(x, 1), weight.to(dtype), bias.to(dtype)), slope)
                if any(ctx.needs_input_grad):
                    kept.append(x if learns else x > 0)
            result = _convolve(x, weights[-1].to(dtype), None)
        ctx.save_for_backward(*weights, *kept)
        return result if dtype == torch.float64 else result.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 2
        weights, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        found: list[Tensor | None] = [None] * count
        with full_precision(gradients[0].device):
            g = gradients[0].to(ctx.dtype)
            if ctx.learns:
                found[-1] = _weight_gradient(g, kept[-1], weights[-1])
            g = channels_last(g * weights[-1].to(ctx.dtype))
            for layer in reversed(range(count // 2)):
                weight = weights[2 * layer]
                # Of the features only the sign counts here; bytes turn into numbers far faster than bools do.
                features = kept[layer + 1] if ctx.learns else kept[layer].view(torch.uint8).to(g.dtype)
                g = torch.ops.aten.leaky_relu_backward(g, features, ctx.slope, False)
                if ctx.learns:
                    found[2 * layer] = _weight_gradient(g, replicate(kept[layer], 1), weight)
                    found[2 * layer + 1] = g.sum((0, *range(2, g.ndim)), dtype=weight.dtype)
                if layer or ctx.needs_input_grad[0]:
                    g = fold(_convolve_mirrored(g, weight.to(ctx.dtype)), 1)
        return (g.to(ctx.given) if ctx.needs_input_grad[0] else None, None, *found)


def replicate(x: Tensor, width: int) -> Tensor:
    """(B, C, *S) with its last values repeated ``width`` times beyond every edge."""
    return F.pad(x, (width,) * (2 * (x.ndim - 2)), mode="replicate")


def fold(padded: Tensor, width: int) -> Tensor:
    """The reverse of :func:`replicate`: what fell beyond an edge is added to the last value. Overwrites its argument.

    Args:
        padded: (B, C, *P) with P = S + 2 width.
        width: of the padding.

    Returns:
        (B, C, *S), part of ``padded``.
    """
    for axis in range(2, padded.ndim):
        size = padded.shape[axis] - 2 * width
        inside = padded.narrow(axis, width, size)
        for start, edge in ((0, 0), (width + size, size - 1)):
            inside.narrow(axis, edge, 1).add_(padded.narrow(axis, start, width).sum(axis, keepdim=True))
        padded = inside
    return padded


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) with its channels last in memory on a CPU, as it is elsewhere."""
    return x.contiguous(memory_format=_layout(x)) if x.device.type == "cpu" else x


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of (B, C, *P), (B, out, *(P - kernel + 1)), with its channels last on a CPU."""
    if x.ndim == 4:
        return channels_last(F.conv2d(x, weight, bias))
    step = max(_SLAB // (len(x) * x.shape[3] * x.shape[4]), 1)
    if x.device.type != "cpu" or x.shape[1] > 1 or x.shape[2] <= step:
        return channels_last(F.conv3d(x, weight, bias))
    margin = weight.shape[2] - 1
    size = [n - margin for n in x.shape[2:]]
    result = x.new_empty((len(x), len(weight), *size)).contiguous(memory_format=_layout(x))
    for start in range(0, size[0], step):
        length = min(step, size[0] - start)
        result.narrow(2, start, length).copy_(F.conv3d(x.narrow(2, start, length + margin), weight, bias))
    return result


def _convolve_mirrored(g: Tensor, weight: Tensor) -> Tensor:
    """The reverse of a convolution without padding: (B, out, *S) to (B, in, *(S + kernel - 1))."""
    mirrored = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
    convolve = F.conv2d if g.ndim == 4 else F.conv3d
    return convolve(g, mirrored, padding=weight.shape[2] - 1)


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient in the weight of a convolution of x (B, in, *P) without padding, from that in its result.

    In full precision: half-precision sums over a whole volume would lose most of it.
    """
    axes, full = weight.ndim - 2, weight.dtype
    options = ([1] * axes, [0] * axes, [1] * axes, False, [0] * axes, 1, [False, True, False])
    result: Tensor = torch.ops.aten.convolution_backward(g.to(full), x.to(full), weight, None, *options)[1]
    return result
