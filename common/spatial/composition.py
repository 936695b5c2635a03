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
"""Compose fields, and integrate stationary velocity fields."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.spatial.exporting import exporting, sample_plainly
from common.spatial.grid import as_field, check_batch
from common.spatial.sampling import padding_code, sample_backward, sample_forward, sample_linear

__all__ = ["compose", "integrate"]


def integrate(velocity: Tensor, steps: int = 7, *, padding: str = "border") -> Tensor:
    """The displacement after unit time along a stationary velocity field, by scaling and squaring.

    Source: Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms (MICCAI 2006).

    Args:
        velocity: (B, d, *S), voxels a unit of time.
        steps: squarings; 0 returns the velocity. The first displacement is ``velocity / 2**steps``.
        padding: of the field outside the grid: ``"border"`` goes on as at the border; ``"zeros"`` stands still there,
            which shrinks what flows in.

    Returns:
        the field (B, d, *S), float32 (float64 if the velocity is). ``integrate(-velocity)`` is its inverse, nearly.

    Raises:
        ValueError: when ``velocity`` is no field, ``steps`` is negative or the padding unknown.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    velocity, code = as_field(velocity, "velocity"), padding_code(padding)
    if exporting():
        ddf = velocity / 2**steps
        for _ in range(steps):
            ddf = ddf + sample_plainly(ddf, ddf, padding)
        return ddf
    if torch.is_grad_enabled() and velocity.requires_grad:
        result: Tensor = _ScalingAndSquaring.apply(velocity, steps, code)
        return result
    return _square(velocity / 2**steps, steps, code)


def compose(outer: Tensor, inner: Tensor, *, padding: str = "border") -> Tensor:
    """One field for two: ``inner(x) + outer(x + inner(x))``.

    ``warp(image, compose(outer, inner))`` is ``warp(warp(image, outer), inner)``, but interpolates the image once.

    Args:
        outer: (B, d, *So), from the middle grid to the moving one.
        inner: (B, d, *Si), from the fixed grid to the middle one.
        padding: of ``outer`` outside its grid, ``"border"`` or ``"zeros"``.

    Returns:
        (B, d, *Si), float32 (float64 if either field is).

    Raises:
        ValueError: when the shapes disagree; it names both.
    """
    outer, inner = as_field(outer, "outer"), as_field(inner, "inner")
    check_batch(outer, inner, "outer")
    dtype = torch.promote_types(outer.dtype, inner.dtype)
    inner = inner.to(dtype)
    return inner + sample_linear(outer.to(dtype), inner, padding)


def _square(ddf: Tensor, steps: int, code: int, kept: list[Tensor] | None = None) -> Tensor:
    """Compose a field with itself ``steps`` times; ``kept`` collects every field but the last."""
    for _ in range(steps):
        if kept is not None:
            kept.append(ddf)
        ddf = sample_forward(ddf, ddf, code).add_(ddf)
    return ddf


class _ScalingAndSquaring(torch.autograd.Function):
    """:func:`integrate` that keeps one field a step, and adds the three gradients of a step up in place."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, steps: int, code: int) -> Tensor:
        kept: list[Tensor] = []
        result = _square(velocity / 2**steps, steps, code, kept)
        ctx.save_for_backward(*kept)
        ctx.steps, ctx.code = steps, code
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        for ddf in reversed(ctx.saved_tensors):
            for_image, for_field = sample_backward(gradient, ddf, ddf, ctx.code, (True, True))
            assert for_image is not None and for_field is not None
            gradient = for_image.add_(gradient).add_(for_field)
        return gradient / 2**ctx.steps, None, None
