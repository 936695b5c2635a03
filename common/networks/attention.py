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
"""Vector field attention: the mean offset to the neighbours that a voxel fits best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.networks.neighbourhood import correlate, correlate_backward, correlate_plainly, neighbour_offsets, row_slabs
from common.spatial.exporting import exporting

__all__ = ["vector_field_attention"]


def vector_field_attention(query: Tensor, key: Tensor, radius: int = 1) -> Tensor:
    """``sum_n w_n(p) * o_n`` with ``w(p)`` the softmax over n of ``C^-0.5 * <query(p), key(p + o_n)>``.

    The offsets ``o_n`` are those of a cube. The backward pass keeps query and key only and works the weights out again,
    slab by slab, so that memory does not grow with the number of offsets.
    Source: Liu et al., Vector field attention for deformable image registration (2024), with the temperature fixed.

    Args:
        query: (B, C, *S), of the fixed image; two or three axes.
        key: (B, C, *S + 2 * radius), of the moving image, ``radius`` voxels wider on every side.
        radius: of the cube, in voxels; no component of the result is larger.

    Returns:
        the field (B, d, *S) in voxels, float32 (float64 if an input is).

    Raises:
        ValueError: when the shapes do not fit (both are named).
    """
    wider = (*query.shape[:2], *(n + 2 * radius for n in query.shape[2:]))
    if query.ndim not in (4, 5) or tuple(key.shape) != wider:
        raise ValueError(
            f"query must be (B, C, *S), 2-D or 3-D, and key {radius} wider on every side, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if exporting():
        offsets = neighbour_offsets(radius, query.ndim - 2, device=query.device).to(torch.float32)
        scores = correlate_plainly(query.float() * query.shape[1] ** -0.5, key.float(), radius)
        return torch.einsum("nd,bn...->bd...", offsets, scores.softmax(1))
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        result: Tensor = _Attention.apply(query, key, radius)
        return result
    return _forward(query, key, radius)


def _precision(query: Tensor, key: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32


def _weights(query: Tensor, key: Tensor, radius: int) -> Tensor:
    """Softmax over the offsets for a slab: (B, n, voxels)."""
    scores = correlate(query * query.shape[1] ** -0.5, key, radius)
    return scores.flatten(2).softmax(1)


def _forward(query: Tensor, key: Tensor, radius: int) -> Tensor:
    dims, dtype = query.ndim - 2, _precision(query, key)
    offsets = neighbour_offsets(radius, dims, device=query.device).to(dtype)
    field = query.new_empty((len(query), dims, *query.shape[2:]), dtype=dtype)
    with torch.autocast(query.device.type, enabled=False):
        for start, stop in row_slabs(query, radius):
            part = query[:, :, start:stop]
            weights = _weights(part.to(dtype), key[:, :, start : stop + 2 * radius].to(dtype), radius)
            field[:, :, start:stop] = (offsets.T @ weights).view(len(query), dims, *part.shape[2:])
    return field


class _Attention(torch.autograd.Function):
    """:func:`vector_field_attention`, which keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, radius: int) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.radius = radius
        return _forward(query, key, radius)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            for_query, for_key = _backward(gradient, query, key, ctx.radius)
        return for_query, for_key, None


def _backward(gradient: Tensor, query: Tensor, key: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    dtype, scale = _precision(query, key), query.shape[1] ** -0.5
    offsets = neighbour_offsets(radius, query.ndim - 2, device=query.device).to(dtype)
    for_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    for_key = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
    for start, stop in row_slabs(query, radius):
        rows, wide = slice(start, stop), slice(start, stop + 2 * radius)
        part, near = query[:, :, rows].to(dtype), key[:, :, wide].to(dtype)
        weights = _weights(part, near, radius)
        # The softmax passes on how much more than the mean each offset is wanted.
        wanted = offsets @ gradient[:, :, rows].flatten(2)
        wanted -= (weights * wanted).sum(1, keepdim=True)
        for_scores = (weights * wanted).view(len(query), -1, *part.shape[2:]).mul_(scale)
        for_part, for_near = correlate_backward(for_scores, part, near, radius)
        for_query[:, :, rows] = for_part
        for_key[:, :, wide] += for_near
    return for_query, for_key.to(key.dtype)
