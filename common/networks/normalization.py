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
"""Instance normalisation, sum and activation in one operation that keeps less for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.networks.blocks import InstanceNorm
from common.spatial.exporting import exporting

__all__ = ["normalize_and_activate"]

_EPSILON = 1e-5  # of F.instance_norm


def normalize_and_activate(*branches: tuple[Tensor, InstanceNorm], slope: float, overwrite: bool = False) -> Tensor:
    """``leaky_relu(sum_i norm_i(x_i))`` of branches (x_i, norm_i).

    For the backward pass each x_i is kept and the result, which the next layer keeps anyway; the operations one by one
    would also keep what is between them: every normalised branch, and their sum.

    Args:
        branches: maps (B, C, *S) of equal shape, each with its affine norm.
        slope: of the leaky ReLU, positive: its sign pattern is read off the result.
        overwrite: where no gradient is recorded, work in the memory of the maps, whose values are then lost.

    Returns:
        (B, C, *S).

    Raises:
        ValueError: when the slope is not positive or a norm is not affine.
    """
    if slope <= 0:
        raise ValueError(f"slope must be positive, got {slope}")
    inputs: list[Tensor] = []
    for x, norm in branches:
        if norm.weight is None or norm.bias is None:
            raise ValueError("the norm of every branch must be affine")
        inputs += [x, norm.weight, norm.bias]
    if inputs[0].shape[2:].numel() == 1 or exporting():
        # All that is left of one voxel is the shift, which statistics would only give up to rounding.
        return F.leaky_relu(torch.stack([norm(x) for x, norm in branches]).sum(0), slope)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        result: Tensor = _NormalizeAndActivate.apply(slope, *inputs)
        return result
    if overwrite and inputs[0].dtype in (torch.float32, torch.float64):  # half precision would round scale and shift
        maps = [_normalized_in_place(*inputs[i : i + 3]) for i in range(0, len(inputs), 3)]
        total = maps[0]
        for other in maps[1:]:
            total.add_(other)
    else:
        total, _ = _normalized_sum(inputs)
    return F.leaky_relu_(total, slope)


def _as_one_item(x: Tensor) -> Tensor:
    """Every channel of every item as a channel of one item: what batch normalisation then does is instance-wise."""
    return x.reshape(1, -1, *x.shape[2:])


def _normalized_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = torch.batch_norm_update_stats(_as_one_item(x), None, None, 0.0)
    scale = weight.repeat(len(x)) * (variance + _EPSILON).rsqrt()
    shift = bias.repeat(len(x)) - mean * scale
    shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
    return torch.addcmul(shift.view(shape).to(x.dtype), x, scale.view(shape).to(x.dtype), out=x)


def _normalized_sum(inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Sum of the normalised branches, a new tensor, and mean and inverse deviation of each."""
    total, statistics = None, []
    for x, weight, bias in zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True):
        scale, shift = weight.repeat(len(x)), bias.repeat(len(x))
        out, mean, deviation = torch.native_batch_norm(_as_one_item(x), scale, shift, None, None, True, 0.0, _EPSILON)
        statistics += [mean, deviation]
        total = out.view(x.shape) if total is None else total.add_(out.view(x.shape))
    assert total is not None
    return total, statistics


class _NormalizeAndActivate(torch.autograd.Function):
    """:func:`normalize_and_activate`."""

    @staticmethod
    def forward(ctx: Any, slope: float, *inputs: Tensor) -> Tensor:
        total, statistics = _normalized_sum(list(inputs))
        result = F.leaky_relu_(total, slope)
        ctx.save_for_backward(result, *inputs, *statistics)
        ctx.slope = slope
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        result, *rest = ctx.saved_tensors
        count = len(rest) // 5  # x, weight, bias, mean, deviation of each branch
        inputs, statistics = rest[: 3 * count], rest[3 * count :]
        passed = torch.ops.aten.leaky_relu_backward(gradient, result, ctx.slope, True)
        gradients: list[Tensor | None] = [None]
        for branch in range(count):
            x, weight = inputs[3 * branch], inputs[3 * branch + 1]
            mean, deviation = statistics[2 * branch], statistics[2 * branch + 1]
            for_x, for_scale, for_shift = torch.ops.aten.native_batch_norm_backward(
                _as_one_item(passed), _as_one_item(x), weight.repeat(len(x)), None, None, mean, deviation, True,
                _EPSILON, [True, True, True],
            )  # fmt: skip
            gradients += [for_x.view(x.shape), for_scale.view(len(x), -1).sum(0), for_shift.view(len(x), -1).sum(0)]
        return tuple(gradients)
