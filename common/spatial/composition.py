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

from torch import Tensor

from common.spatial.grid import as_field, check_batch
from common.spatial.sampling import sample_linear

__all__ = ["compose", "integrate"]


def integrate(velocity: Tensor, steps: int = 7, *, padding: str = "border") -> Tensor:
    """The displacement after unit time along a stationary velocity field, by scaling and squaring.

    Source: Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms (MICCAI 2006).

    Args:
        velocity: (B, d, *S), voxels a unit of time.
        steps: squarings; 0 returns the velocity. The first step is ``velocity / 2**steps``.
        padding: of the field outside the grid: ``"border"`` goes on as at the border; ``"zeros"`` stands still there,
            which shrinks what flows in.

    Returns:
        the field (B, d, *S), float32.

    Raises:
        ValueError: when ``velocity`` is no field or ``steps`` is negative.
    """
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    ddf = as_field(velocity, "velocity") / 2**steps
    for _ in range(steps):
        ddf = ddf + sample_linear(ddf, ddf, padding)
    return ddf


def compose(outer: Tensor, inner: Tensor, *, padding: str = "border") -> Tensor:
    """One field for two: ``inner(x) + outer(x + inner(x))``.

    ``warp(image, compose(outer, inner))`` is ``warp(warp(image, outer), inner)``, but interpolates the image once.

    Args:
        outer: (B, d, *So), from the middle grid to the moving one.
        inner: (B, d, *Si), from the fixed grid to the middle one.
        padding: of ``outer`` outside its grid, ``"border"`` or ``"zeros"``.

    Returns:
        (B, d, *Si), float32.

    Raises:
        ValueError: when the shapes disagree; it names both.
    """
    outer, inner = as_field(outer, "outer"), as_field(inner, "inner")
    check_batch(outer, inner, "outer")
    if outer.dtype != inner.dtype:
        outer, inner = outer.double(), inner.double()
    return inner + sample_linear(outer, inner, padding)
