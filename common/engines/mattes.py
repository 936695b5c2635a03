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
"""Mutual information of two images, by Mattes' estimate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["mattes_information"]

_BINS = 32


def mattes_information(moved: Tensor, fixed: Tensor, mask: Tensor | None = None, bins: int = _BINS) -> Tensor:
    """Mutual information in nats by the estimate of Mattes et al. (IEEE TMI 22, 2003).

    A voxel of the fixed image counts in one bin; one of the moved image in four, by a cubic B-spline, which makes the
    estimate smooth. The histogram is summed in whole numbers, whose order does not matter, so that a GPU gives the same
    every time.

    Args:
        moved: (1, 1, *S) in [0, 1].
        fixed: (1, 1, *S) in [0, 1].
        mask: (1, 1, *S), how much each voxel counts, in [0, 1].
        bins: along each axis, the two outer ones on either side for the width of the spline.

    Returns:
        a scalar, differentiable once in ``moved``.
    """
    result: Tensor = _Mattes.apply(moved, fixed, mask, bins)
    return result


class _Mattes(torch.autograd.Function):
    """The estimate; its derivative by a voxel is that of its four weights times log(p(moved, fixed) / p(moved))."""

    @staticmethod
    def forward(ctx: Any, moved: Tensor, fixed: Tensor, mask: Tensor | None, bins: int) -> Tensor:
        rows = (fixed.flatten() * (bins - 1)).round_().long() * bins
        position = moved.detach().flatten().clamp(0.0, 1.0) * (bins - 5) + 2
        first = position.floor().clamp_(2, bins - 4)
        part = position - first
        base = rows + first.long() - 1
        weight = None if mask is None else mask.flatten()
        counts = torch.zeros(bins * bins, dtype=torch.int64, device=moved.device)
        unit = 2.0**20
        for k, value in enumerate(_spline(part)):
            value = value if weight is None else value * weight
            counts.index_add_(0, base + k, value.mul_(unit).round_().long())
        joint = counts.double().view(bins, bins)
        total = joint.sum().clamp_min(1.0)
        joint = joint / total
        marginal = joint.sum(0, keepdim=True)
        tiny = torch.finfo(torch.float64).tiny
        ratio = (joint.clamp_min(tiny) / marginal.clamp_min(tiny)).log().masked_fill_(joint == 0, 0.0)
        own = joint.sum(1, keepdim=True).clamp_min(tiny).log()
        ctx.scale = (bins - 5) * unit / total
        ctx.shape = moved.shape
        ctx.save_for_backward(base, part, ratio.float().flatten(), *([] if weight is None else [weight]))
        return (joint * (ratio - own)).sum().float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        base, part, ratio, *weight = ctx.saved_tensors
        slope = torch.zeros_like(part)
        for k, value in enumerate(_spline_slope(part)):
            slope.addcmul_(value, ratio.index_select(0, base + k))
        slope.mul_((ctx.scale * upstream).float())
        if weight:
            slope.mul_(weight[0])
        return slope.view(ctx.shape), None, None, None


def _spline(part: Tensor) -> list[Tensor]:
    """The four weights of a cubic B-spline at a distance in [0, 1] from the second."""
    rest = 1 - part
    return [
        rest**3 / 6,
        2 / 3 - part**2 * (1 - part / 2),
        2 / 3 - rest**2 * (1 - rest / 2),
        part**3 / 6,
    ]


def _spline_slope(part: Tensor) -> list[Tensor]:
    """The derivatives of :func:`_spline`."""
    rest = 1 - part
    return [-(rest**2) / 2, part * (1.5 * part - 2), -rest * (1.5 * rest - 2), part**2 / 2]
