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
PyTorch's own transposed convolutions of so few channels are three times slower. Large volumes are computed slab by
slab, through all layers at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
# Bytes: a result over 32 MiB comes from memory that is new, and slow, at every call.
_MAPPED = 24 * 2**20


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
        with full_precision(image.device):
            x, cast = image.to(dtype), [weight.to(dtype) for weight in weights]
            ctx.slabs = _slabs(x, cast, whole=learns)
            result, kept = _forwards(x, slope, cast, ctx.slabs, learns, any(ctx.needs_input_grad))
        ctx.save_for_backward(*weights, *kept)
        return result if dtype == torch.float64 else result.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad) - 2
        weights, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        with full_precision(gradients[0].device):
            gradient, cast = gradients[0].to(ctx.dtype), [weight.to(ctx.dtype) for weight in weights]
            image, found = _backwards(gradient, ctx.slope, cast, ctx.slabs, kept, ctx.learns, ctx.needs_input_grad[0])
        return (image.to(ctx.given) if ctx.needs_input_grad[0] else None, None, *found)


def _forwards(
    image: Tensor, slope: float, weights: Sequence[Tensor], slabs: Sequence[_Slab], learns: bool, signs: bool
) -> tuple[Tensor, list[Tensor]]:
    """The map, and what the backward pass needs: image and features where weights learn, else signs or nothing."""
    layers, sizes = len(weights) // 2, image.shape[2:]
    result = image.new_empty((len(image), 1, *sizes))
    kept = [image] if learns else []
    if signs and not learns:
        kept = [
            torch.empty((len(image), len(bias), *sizes), dtype=torch.bool, device=image.device).contiguous(
                memory_format=_layout(image)
            )
            for bias in weights[1::2]
        ]
    for slab in slabs:
        x = slab.of(image, layers)
        for layer in range(layers):
            left = layers - 1 - layer
            x = _convolve(slab.replicate(x, left), weights[2 * layer], weights[2 * layer + 1])
            x = F.leaky_relu_(x, slope)
            if learns:
                kept.append(x)
            elif signs:
                torch.gt(slab.inside(x, left), 0, out=slab.of(kept[layer]))
        slab.of(result).copy_(_convolve(x, weights[-1], None))
    return result, kept


def _backwards(
    gradient: Tensor,
    slope: float,
    weights: Sequence[Tensor],
    slabs: Sequence[_Slab],
    kept: Sequence[Tensor],
    learns: bool,
    for_image: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients in the image and in the weights, from that in the map and what :func:`_forwards` kept."""
    layers, features = len(weights) // 2, kept[1:] if learns else kept
    found: list[Tensor | None] = [None] * len(weights)
    image = gradient.new_empty((len(gradient), weights[0].shape[1], *gradient.shape[2:]) if for_image else 0)
    if learns:
        found[-1] = _weight_gradient(gradient, kept[-1], weights[-1])
    for slab in slabs:
        g = channels_last(slab.of(gradient, layers) * weights[-1])
        for layer in reversed(range(layers)):
            feature = slab.of(features[layer], layer + 1)
            # Only the sign counts here; bytes turn into numbers far faster than bools do.
            feature = feature if learns else feature.view(torch.uint8).to(g.dtype)
            g = torch.ops.aten.leaky_relu_backward(g, feature, slope, False)
            if learns:
                found[2 * layer] = _weight_gradient(g, replicate(kept[layer], 1), weights[2 * layer])
                found[2 * layer + 1] = g.sum((0, *range(2, g.ndim)), dtype=_full(g))
            if layer or for_image:
                g = slab.reverse(g, weights[2 * layer], layer)
        if for_image:
            slab.of(image).copy_(g)
    return image, found


@dataclass(frozen=True)
class _Slab:
    """Planes of a volume across its first axis, for which the network is computed at a time.

    A convolution needs one plane more at either side, but for the volume's own ends. "More" is the number of
    convolutions that are still to come (in the backward pass, that are still to be reversed).

    Args:
        start: the first plane.
        stop: the plane behind the last one.
        size: of the volume.
    """

    start: int
    stop: int
    size: int

    def bounds(self, more: int) -> tuple[int, int]:
        """First plane, and the one behind the last, that are needed."""
        return max(self.start - more, 0), min(self.stop + more, self.size)

    def of(self, volume: Tensor, more: int = 0) -> Tensor:
        """The needed part of a whole volume (B, C, *S)."""
        first, behind = self.bounds(more)
        return volume.narrow(2, first, behind - first)

    def inside(self, x: Tensor, more: int) -> Tensor:
        """The slab's own planes of x, which has more."""
        return x.narrow(2, self.start - self.bounds(more)[0], self.stop - self.start)

    def replicate(self, x: Tensor, more: int) -> Tensor:
        """Pad x by one voxel beyond the edges of the volume; ``more`` is that of the convolution's result."""
        first, behind = self.bounds(more)
        widths = (1,) * (2 * (x.ndim - 3)) + (int(first == 0), int(behind == self.size))
        return F.pad(x, widths, mode="replicate")

    def reverse(self, g: Tensor, weight: Tensor, more: int) -> Tensor:
        """The gradient in what was padded and convolved, from that in the result; ``more`` is that of the former."""
        first, behind = self.bounds(more)
        ends = (int(first == 0), int(behind == self.size))
        g = F.pad(g, (0,) * (2 * (g.ndim - 3)) + (2 * ends[0], 2 * ends[1]))
        mirrored = weight.transpose(0, 1).flip(tuple(range(2, weight.ndim)))
        convolve = F.conv2d if g.ndim == 4 else F.conv3d
        return fold(convolve(g, mirrored, padding=(0,) + (2,) * (g.ndim - 3)), 1, ends)


def _slabs(image: Tensor, weights: Sequence[Tensor], whole: bool) -> list[_Slab]:
    """On a CPU, slabs whose features are not so large that they come from new memory."""
    size, halo = image.shape[2], len(weights) - 1
    if whole or image.device.type != "cpu" or image.ndim == 4:
        return [_Slab(0, size, size)]
    plane = len(image) * max(len(weight) for weight in weights) * image.shape[3:].numel() * image.element_size()
    most = max(_MAPPED // plane - halo, halo)
    parts = -(-size // most)
    edges = [size * k // parts for k in range(parts + 1)]  # as equal as can be: a thin one would be mostly margin
    return [_Slab(start, stop, size) for start, stop in pairwise(edges)]


def replicate(x: Tensor, width: int) -> Tensor:
    """(B, C, *S) with its last values repeated ``width`` times beyond every edge."""
    return F.pad(x, (width,) * (2 * (x.ndim - 2)), mode="replicate")


def fold(padded: Tensor, width: int, ends: tuple[int, int] = (1, 1)) -> Tensor:
    """The reverse of :func:`replicate`: what fell beyond an edge is added to the last value. Overwrites its argument.

    Args:
        padded: (B, C, *P) with P = S + 2 width.
        width: of the padding.
        ends: whether the first axis was padded at its two ends, 1 or 0.

    Returns:
        (B, C, *S), part of ``padded``.
    """
    for axis in range(2, padded.ndim):
        before, after = (width * end for end in (ends if axis == 2 else (1, 1)))
        size = padded.shape[axis] - before - after
        inside = padded.narrow(axis, before, size)
        for start, count, edge in ((0, before, 0), (before + size, after, size - 1)):
            if count:
                inside.narrow(axis, edge, 1).add_(padded.narrow(axis, start, count).sum(axis, keepdim=True))
        padded = inside
    return padded


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) with its channels last in memory on a CPU, as it is elsewhere."""
    return x.contiguous(memory_format=_layout(x)) if x.device.type == "cpu" else x


def _layout(x: Tensor) -> torch.memory_format:
    if x.device.type != "cpu":
        return torch.contiguous_format
    return torch.channels_last if x.ndim == 4 else torch.channels_last_3d


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of (B, C, *P), (B, out, *(P - kernel + 1)), with its channels last on a CPU."""
    if x.ndim == 4:
        return channels_last(F.conv2d(x, weight, bias))
    # Of one channel oneDNN makes 16, however few are wanted, before it puts them in order.
    step = max(_MAPPED // (64 * len(x) * x.shape[3:].numel()), 1)
    if x.device.type != "cpu" or x.shape[1] > 1 or x.shape[2] <= step:
        return channels_last(F.conv3d(x, weight, bias))
    margin = weight.shape[2] - 1
    size = [n - margin for n in x.shape[2:]]
    result = x.new_empty((len(x), len(weight), *size)).contiguous(memory_format=_layout(x))
    for start in range(0, size[0], step):
        length = min(step, size[0] - start)
        result.narrow(2, start, length).copy_(F.conv3d(x.narrow(2, start, length + margin), weight, bias))
    return result


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient in the weight of a convolution of x (B, in, *P) without padding, from that in its result.

    In full precision: half-precision sums over a whole volume would lose most of it.
    """
    axes, full = weight.ndim - 2, _full(weight)
    options = ([1] * axes, [0] * axes, [1] * axes, False, [0] * axes, 1, [False, True, False])
    given = (tensor.to(full) for tensor in (g, x, weight))
    result: Tensor = torch.ops.aten.convolution_backward(*given, None, *options)[1]
    return result


def _full(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
