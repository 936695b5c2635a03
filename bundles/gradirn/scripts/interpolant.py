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
"""A linearly interpolated image and its slopes at displaced voxels, in closed form.

The slope along an axis is the difference of the two corners along it, interpolated linearly along the other axes. It is
what differentiating the interpolant gives, so a gradient step needs no automatic differentiation. Positions are exact,
``index + displacement``: at whole voxels the slope is the forward difference, on every device. Beyond the outermost
voxels the image repeats, and the slope is 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.spatial.exporting import exporting

__all__ = ["value_and_slopes"]

_Axes = tuple[int, ...]


def value_and_slopes(image: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """``image(x + ddf(x))`` and its derivatives in ``ddf``.

    Both results can be differentiated (once) in both arguments: the derivative of a slope along one axis by the
    position along another is the mixed difference of the corners, and along its own axis it is 0.

    Args:
        image: (B, C, *S), float32 or float64.
        ddf: (B, d, *S), voxels, of the image's dtype.

    Returns:
        the values (B, C, *S) and the slopes (B, C, d, *S), channel k along array axis k.
    """
    if torch.is_grad_enabled() and (image.requires_grad or ddf.requires_grad) and not exporting():
        value, slopes = _ValueAndSlopes.apply(image, ddf)
        return value, slopes
    return _forward(image, ddf)


class _Corners(NamedTuple):
    """The corners around positions.

    Attributes:
        index: for every axis the indices of the lower and of the upper corner, times the axis's stride, (B, *S) each.
        parts: for every axis how far the position is from the lower corner, in [0, 1), (B, *S).
        start: where each item begins in a flat channel, (B, 1, ...).
    """

    index: list[tuple[Tensor, Tensor]]
    parts: list[Tensor]
    start: Tensor

    def flat(self, corner: Sequence[int]) -> Tensor:
        """Indices of one corner in a flat channel (B * voxels,); ``corner`` has 0 or 1 for every axis."""
        index = self.start
        for pair, side in zip(self.index, corner, strict=True):
            index = index + pair[side]
        return index.flatten()


def _locate(ddf: Tensor) -> _Corners:
    """The corners around ``x + ddf(x)`` on a grid of the field's own size."""
    size = ddf.shape[2:]
    index, parts = [], []
    start = torch.arange(len(ddf), device=ddf.device) * math.prod(size)
    for axis, count in enumerate(size):
        stride = math.prod(size[axis + 1 :])
        places = torch.arange(count, device=ddf.device, dtype=ddf.dtype)
        position = ddf[:, axis] + places.view([-1 if k == axis else 1 for k in range(len(size))])
        low = position.floor()
        parts.append(position.sub_(low))
        # Held to the image before it becomes an integer, which a huge number or none at all could not.
        low = low.clamp_(-1, count - 1).long()
        index.append((low.clamp(0, count - 1) * stride, low.add_(1).clamp_(0, count - 1) * stride))
    return _Corners(index, parts, start.view(-1, *(1,) * len(size)))


def _derivatives(read: Callable[[_Axes], Tensor], parts: Sequence[Tensor], order: int) -> dict[_Axes, Tensor]:
    """The interpolant and its derivatives along up to ``order`` different axes, by those axes.

    The corners are halved along one axis after another, to the end first, so that few are in memory at once.
    """

    def halve(corner: _Axes) -> dict[_Axes, Tensor]:
        axis = len(corner)
        if axis == len(parts):
            return {(): read(corner)}
        found = {}
        low, high = halve((*corner, 0)), halve((*corner, 1))
        for axes, start in low.items():
            if len(axes) < order:
                found[(axis, *axes)] = high[axes] - start
            found[axes] = start.lerp_(high[axes], parts[axis])
        return found

    return halve(())


def _reader(channel: Tensor, corners: _Corners) -> Callable[[_Axes], Tensor]:
    """A function that looks a corner up in a channel (B, *S)."""
    flat = channel.reshape(-1)
    return lambda corner: flat.index_select(0, corners.flat(corner)).view(channel.shape)


def _forward(image: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`value_and_slopes`, not to be differentiated."""
    corners = _locate(ddf)
    value = torch.empty_like(image, memory_format=torch.contiguous_format)
    slopes = image.new_empty((*image.shape[:2], *ddf.shape[1:]))
    for channel in range(image.shape[1]):
        found = _derivatives(_reader(image[:, channel], corners), corners.parts, order=1)
        value[:, channel] = found[()]
        for axis in range(ddf.shape[1]):
            slopes[:, channel, axis] = found[(axis,)]
    return value, slopes


def _gradient_in_ddf(for_value: Tensor, for_slopes: Tensor, image: Tensor, ddf: Tensor, corners: _Corners) -> Tensor:
    """What arrives at values and slopes, brought to the field."""
    result = torch.zeros_like(ddf, memory_format=torch.contiguous_format)
    dims = ddf.shape[1]
    for channel in range(image.shape[1]):
        found = _derivatives(_reader(image[:, channel], corners), corners.parts, order=2)
        for axis in range(dims):
            result[:, axis].addcmul_(for_value[:, channel], found[(axis,)])
        for first, second in itertools.combinations(range(dims), 2):
            mixed = found[(first, second)]
            result[:, first].addcmul_(for_slopes[:, channel, second], mixed)
            result[:, second].addcmul_(for_slopes[:, channel, first], mixed)
    return result


def _gradient_in_image(for_value: Tensor, for_slopes: Tensor, image: Tensor, corners: _Corners) -> Tensor:
    """What arrives at values and slopes, brought to the corners: the reverse of :func:`_derivatives`."""
    result = torch.zeros_like(image, memory_format=torch.contiguous_format)

    def share(arrived: dict[_Axes, Tensor], corner: _Axes, total: Tensor) -> None:
        axis = len(corner)
        if axis == len(corners.parts):
            total.index_add_(0, corners.flat(corner), arrived[()].reshape(-1))
            return
        low, high = {}, {}
        for axes, gradient in arrived.items():
            if axis in axes:
                continue
            slope = arrived.get((axis, *axes), torch.zeros((), dtype=gradient.dtype, device=gradient.device))
            high[axes] = gradient * corners.parts[axis] + slope
            low[axes] = gradient - high[axes]
        share(low, (*corner, 0), total)
        share(high, (*corner, 1), total)

    for channel in range(image.shape[1]):
        total = torch.zeros_like(image[:, channel], memory_format=torch.contiguous_format)
        slopes = {(axis,): for_slopes[:, channel, axis] for axis in range(for_slopes.shape[2])}
        share({(): for_value[:, channel], **slopes}, (), total.view(-1))
        result[:, channel] = total
    return result


class _ValueAndSlopes(torch.autograd.Function):
    """:func:`value_and_slopes` that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, ddf: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(image, ddf)
        return _forward(image, ddf)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_value: Tensor, for_slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        image, ddf = ctx.saved_tensors
        corners = _locate(ddf)
        in_image = _gradient_in_image(for_value, for_slopes, image, corners) if ctx.needs_input_grad[0] else None
        in_ddf = _gradient_in_ddf(for_value, for_slopes, image, ddf, corners) if ctx.needs_input_grad[1] else None
        return in_image, in_ddf
