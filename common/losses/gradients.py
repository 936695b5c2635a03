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
"""Gradients that a loss has already computed in its forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled_gradient(upstream: Tensor, gradient: Tensor, source: Tensor) -> Tensor:
    """What a backward pass returns: ``gradient`` times what arrives from above.

    Under ``create_graph=True`` the result remembers that it depends on ``source``, so that differentiating it again is
    an error. Without that it would count as constant, and a second derivative would silently come out as 0.

    Args:
        upstream: the gradient of the scalar, ().
        gradient: the scalar's gradient in ``source``, of its shape.
        source: what the scalar was computed from.
    """
    if torch.is_grad_enabled():
        return _DifferentiatedOnce.apply(upstream, gradient, source)
    return upstream * gradient


class _DifferentiatedOnce(torch.autograd.Function):
    """The product, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, gradient: Tensor, source: Tensor) -> Tensor:
        return upstream * gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("this loss computes its gradient along with its value and cannot be differentiated twice")
