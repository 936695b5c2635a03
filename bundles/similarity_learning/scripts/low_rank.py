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
"""Samples and energies of Gaussians with covariance D + U Uᵀ, D = diag(exp(log_var)), in few passes and little memory.

The energies are taken from R x R matrices (the determinant lemma and Woodbury's identity). With G = Uᵀ D⁻¹ U,
C = I + G, p = Uᵀ D⁻¹ x and a = C⁻¹ p,

    log det(D + U Uᵀ) = log det C + sum(log_var)
    xᵀ (D + U Uᵀ)⁻¹ x = xᵀ D⁻¹ x - pᵀ a,        (D + U Uᵀ)⁻¹ x = D⁻¹ (x - U a).

G, p and xᵀ D⁻¹ x are the inner products of the rows of (U, x). Nothing of the size of the parameters is kept for the
backward pass but what was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["half_energies", "low_rank_deviation", "standard_draws"]

# Numbers worked on at a time on a CPU, so that they stay in its cache.
_PIECE_CPU = 2**14


def standard_draws(log_var: Tensor, factors: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The standard normal numbers of one sample an image: noise as ``log_var``, and a coefficient a factor.

    Args:
        log_var: (B, d, *L).
        factors: (B, R, d, *L).
        generator: where they come from, on any device; PyTorch's own one if not given.

    Returns:
        (B, d, *L) and (B, R), on the device of ``log_var``.
    """
    device = log_var.device if generator is None else generator.device
    noise = torch.randn(log_var.shape, generator=generator, device=device)
    coefficients = torch.randn(factors.shape[:2], generator=generator, device=device)
    return noise.to(log_var), coefficients.to(log_var)


def low_rank_deviation(log_var: Tensor, factors: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
    """``noise * exp(log_var / 2) + sum_r coefficients_r * factors_r``, differentiable once in the first two.

    Args:
        log_var: (B, d, *L).
        factors: (B, R, d, *L).
        noise: (B, d, *L).
        coefficients: (B, R).

    Returns:
        (B, d, *L).
    """
    result: Tensor = _Deviation.apply(log_var, factors, noise, coefficients)
    return result


def half_energies(log_var: Tensor, factors: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Half the log-determinant of the covariance, and half the squared Mahalanobis distance of ``deviation``.

    Sums over parameters are carried on in float64, where the device has it.

    Args:
        log_var: (B, d, *L).
        factors: (B, R, d, *L).
        deviation: (B, d, *L), distances from the mean.

    Returns:
        two tensors (B,), differentiable once in all arguments.
    """
    determinant, distance = _HalfEnergies.apply(log_var, factors, deviation)
    return determinant, distance


class _Deviation(torch.autograd.Function):
    """Keeps the arguments."""

    @staticmethod
    def forward(ctx: Any, log_var: Tensor, factors: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(log_var, noise, coefficients)
        result = torch.mul(log_var, 0.5).exp_().mul_(noise)
        for factor, share in zip(factors.unbind(1), coefficients.unbind(1), strict=True):
            result.addcmul_(factor, _as_scale(share, result))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        log_var, noise, coefficients = ctx.saved_tensors
        for_log_var = torch.mul(log_var, 0.5).exp_().mul_(noise).mul_(gradient).mul_(0.5)
        for_factors = _as_scale(coefficients, gradient.unsqueeze(1)) * gradient.unsqueeze(1)
        return for_log_var, for_factors, None, None


class _HalfEnergies(torch.autograd.Function):
    """Keeps the arguments, and what of size R x R was solved for."""

    @staticmethod
    def forward(ctx: Any, log_var: Tensor, factors: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        batch, rank = factors.shape[:2]
        exact = torch.float32 if log_var.device.type == "mps" else torch.float64
        products = torch.zeros(batch, rank + 1, rank + 1, dtype=exact, device=log_var.device)
        log_scale = products.new_zeros(batch)
        for part in _pieces(log_var):
            logs = log_var.flatten(1)[:, part]
            rows = torch.cat((factors.flatten(2)[:, :, part], deviation.flatten(1)[:, None, part]), dim=1)
            products += rows @ (rows * torch.exp(-logs)[:, None]).mT
            log_scale += logs.sum(1)
        capacitance = products[:, :rank, :rank] + torch.eye(rank, dtype=exact, device=log_var.device)
        along = products[:, :rank, rank:]
        # No error for what is no number: whoever called looks at the energies, and knows the image.
        root = torch.linalg.cholesky_ex(capacitance)[0]
        inverse = torch.cholesky_inverse(root)
        solved = inverse @ along
        determinant = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * log_scale
        distance = 0.5 * (products[:, rank, rank] - (along * solved).sum((1, 2)))
        ctx.save_for_backward(log_var, factors, deviation, inverse.to(log_var), solved.squeeze(-1).to(log_var))
        return determinant.to(log_var), distance.to(log_var)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_determinant: Tensor, for_distance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_var, factors, deviation, inverse, solved = ctx.saved_tensors
        gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ctx.saved_tensors[:3]]
        of_determinant, of_distance = for_determinant[:, None], for_distance[:, None]
        for part in _pieces(log_var):
            precision = torch.exp(-log_var.flatten(1)[:, part])
            columns = factors.flatten(2)[:, :, part]
            # x - U a; times the precision it is the covariance's inverse applied to x.
            rest = deviation.flatten(1)[:, part] - (solved[:, None] @ columns).squeeze(1)
            pull = precision * rest * of_distance
            spread = inverse @ columns  # times the precision, the covariance's inverse applied to U
            share = 1 - precision * (spread * columns).sum(1)
            slope = spread * (precision * of_determinant)[:, None] - solved[..., None] * pull[:, None]
            gradients[0].flatten(1)[:, part] = 0.5 * (share * of_determinant - rest * pull)
            gradients[1].flatten(2)[:, :, part] = slope
            gradients[2].flatten(1)[:, part] = pull
        return gradients[0], gradients[1], gradients[2]


def _as_scale(values: Tensor, like: Tensor) -> Tensor:
    """The values with axes of size 1 appended, to multiply ``like`` by."""
    return values.view(*values.shape, *(1,) * (like.ndim - values.ndim))


def _pieces(tensor: Tensor) -> list[slice]:
    """Cut the numbers of each image in pieces on a CPU; a GPU takes all at once."""
    count = tensor[0].numel()
    step = max(1, _PIECE_CPU // len(tensor)) if tensor.device.type == "cpu" else count
    return [slice(start, start + step) for start in range(0, count, step)]
