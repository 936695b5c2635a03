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
"""A regularisation weight for each voxel: the penalty it weighs, what keeps it from vanishing, and its best value.

A network that may choose its own weight map lambda would choose 0 and be free of every penalty. A hyperprior whose
mode is lambda = 1 makes that expensive, so that the map is small only where smoothness costs more than the prior does,
such as along organs that slide on one another. Losses after Chen et al., "Unsupervised learning of spatially varying
regularization for diffeomorphic image registration", arXiv 2412.17982.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.losses import Diffusion
from common.losses.checks import as_float, full_precision

__all__ = [
    "LARGEST",
    "SMALLEST",
    "BetaHyperprior",
    "GaussianHyperprior",
    "SpatiallyWeightedDiffusion",
    "local_energy",
    "optimal_weight_map",
]

# What the weight map is clamped to before the priors see it.
SMALLEST, LARGEST = 1e-6, 5.0


class BetaHyperprior(nn.Module):
    """Minus the logarithm of a Beta(alpha, 1) density, without its constant: ``-(alpha - 1) * mean(log lambda)``.

    Lambda is clamped to [1e-6, 1] first, so that the prior is never negative and has no gradient beyond.

    Args:
        alpha: at least 1; the larger, the closer to uniform regularisation. 1.175 is the paper's for brain MRI.

    Raises:
        ValueError: for a number below 1.
    """

    def __init__(self, alpha: float = 1.175) -> None:
        super().__init__()
        self.alpha = _number("BetaHyperprior", "alpha", alpha, least=1.0)

    def forward(self, weight_map: Tensor, alpha: Tensor | float | None = None) -> Tensor:
        """The prior's penalty.

        Args:
            weight_map: (B, 1, *S).
            alpha: instead of the module's own, one number or one for each item, (B,).

        Returns:
            a scalar, float32 (float64 for a float64 map).

        Raises:
            ValueError: when ``alpha`` has neither one number nor B.
        """
        _check_map("BetaHyperprior", weight_map)
        with full_precision(weight_map.device):
            energy = -as_float(weight_map).clamp(SMALLEST, 1.0).log()
            strength = _per_item("BetaHyperprior", "alpha", self.alpha if alpha is None else alpha, energy) - 1.0
            return (strength * energy.flatten(1).mean(1)).mean()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"alpha={self.alpha:g}"


class GaussianHyperprior(nn.Module):
    """A normal density around 1, without its constant: ``sigma * mean((lambda - 1)^2)``.

    As in the published code ``sigma`` multiplies the square, so it is 1 / (2 variance): the larger, the closer to
    uniform regularisation. Lambda is clamped to [1e-6, 5] first.

    Args:
        sigma: not negative. 0.525 is the paper's for brain MRI.

    Raises:
        ValueError: for a negative number.
    """

    def __init__(self, sigma: float = 0.525) -> None:
        super().__init__()
        self.sigma = _number("GaussianHyperprior", "sigma", sigma, least=0.0)

    def forward(self, weight_map: Tensor, sigma: Tensor | float | None = None) -> Tensor:
        """The prior's penalty.

        Args:
            weight_map: (B, 1, *S).
            sigma: instead of the module's own, one number or one for each item, (B,).

        Returns:
            a scalar, float32 (float64 for a float64 map).

        Raises:
            ValueError: when ``sigma`` has neither one number nor B.
        """
        _check_map("GaussianHyperprior", weight_map)
        with full_precision(weight_map.device):
            energy = (as_float(weight_map).clamp(SMALLEST, LARGEST) - 1.0).square()
            strength = _per_item("GaussianHyperprior", "sigma", self.sigma if sigma is None else sigma, energy)
            return (strength * energy.flatten(1).mean(1)).mean()

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"sigma={self.sigma:g}"


class SpatiallyWeightedDiffusion(nn.Module):
    """``w`` times the diffusion energy in which every difference counts by the weight map.

    Args:
        w: overall strength, not negative. 3.35 is the paper's for brain MRI.
        penalty: "l2" or "l1".
        spacing: voxel size in mm along each axis, or one number; see :class:`common.losses.Diffusion`. Needed where
            voxels are anisotropic: else a step between thick slices costs as much as one within a slice.
        weight_at: "edge": a difference counts by the mean of its two voxels' weights. "upper": by that of the voxel of
            higher index, as published, which changes when an image is flipped.

    Raises:
        ValueError: for a negative ``w``, an unknown choice or a spacing that is not positive.
    """

    def __init__(
        self,
        w: float = 3.35,
        penalty: str = "l2",
        spacing: Sequence[float] | float | None = None,
        weight_at: str = "edge",
    ) -> None:
        super().__init__()
        self.w = _number("SpatiallyWeightedDiffusion", "w", w, least=0.0)
        self.diffusion = Diffusion(penalty, spacing, weight_at=weight_at)

    def forward(self, ddf: Tensor, weight_map: Tensor | None = None, w: Tensor | float | None = None) -> Tensor:
        """The penalty; it has a gradient in the field and in the map.

        Args:
            ddf: (B, d, *S), voxels.
            weight_map: (B, 1, *S); without one every weight is 1, uniform regularisation.
            w: instead of the module's own, one number or one for each item, (B,).

        Returns:
            a scalar, float32 (float64 for a float64 field).

        Raises:
            TypeError: when an argument is no tensor.
            ValueError: when ``ddf`` is no field, or another argument does not fit it.
        """
        w = self.w if w is None else w
        if not isinstance(w, Tensor):
            return w * self.diffusion(ddf, weight_map)
        with full_precision(ddf.device):
            strength = _per_item("SpatiallyWeightedDiffusion", "w", w, as_float(ddf))
            strength = strength.view(-1, *[1] * (ddf.ndim - 1))
            if weight_map is None:
                return self.diffusion(ddf, strength.expand(-1, 1, *ddf.shape[2:]))
            return self.diffusion(ddf, strength * as_float(weight_map))

    def extra_repr(self) -> str:
        """The settings, for ``print``."""
        return f"w={self.w:g}, weight_at={self.diffusion.weight_at!r}"


def optimal_weight_map(
    ddf: Tensor,
    w: Tensor | float,
    *,
    alpha: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    penalty: str = "l2",
    spacing: Sequence[float] | float | None = None,
    weight_at: str = "edge",
) -> Tensor:
    """The weight map that minimises penalty and prior while the field stays as it is, in closed form.

    With e the energy that a voxel's weight multiplies (see :func:`local_energy`), the Beta prior has its minimum at
    ``min(1, (alpha - 1) / (w e))`` and the Gaussian one at ``1 - w e / (2 sigma)``; both are clamped to [1e-6, 1].
    Put back into the loss these are robust penalties of the field: quadratic up to ``w e = alpha - 1`` and logarithmic
    beyond, or a quadratic that ends in a constant at ``w e = 2 sigma``.

    Args:
        ddf: (B, d, *S), voxels.
        w: strength of the diffusion energy, one number or one for each item, (B,).
        alpha: of the Beta prior, one number or (B,).
        sigma: of the Gaussian prior, one number or (B,). Give one of the two.
        penalty, spacing, weight_at: as for :class:`SpatiallyWeightedDiffusion`.

    Returns:
        (B, 1, *S) in [1e-6, 1], float32 (float64 for a float64 field), without a gradient.

    Raises:
        ValueError: when both or neither of ``alpha`` and ``sigma`` are given, or arguments do not fit the field.
    """
    if (alpha is None) == (sigma is None):
        raise ValueError(f"optimal_weight_map needs either alpha or sigma, got alpha={alpha} and sigma={sigma}")
    energy = local_energy(ddf, penalty=penalty, spacing=spacing, weight_at=weight_at)
    axes = [1] * (ddf.ndim - 1)
    energy = energy * _per_item("optimal_weight_map", "w", w, energy).view(-1, *axes)
    if alpha is not None:
        strength = _per_item("optimal_weight_map", "alpha", alpha, energy).view(-1, *axes) - 1.0
        best = torch.where(energy > strength, strength / energy, torch.ones_like(energy))
    else:
        assert sigma is not None
        strength = _per_item("optimal_weight_map", "sigma", sigma, energy).view(-1, *axes)
        # Without any prior only a voxel that costs nothing keeps its weight: 0 / 0 stands for that.
        best = 1.0 - (energy / (2.0 * strength)).nan_to_num(nan=0.0, posinf=1.0)
    return best.clamp(SMALLEST, 1.0)


def local_energy(
    ddf: Tensor, *, penalty: str = "l2", spacing: Sequence[float] | float | None = None, weight_at: str = "edge"
) -> Tensor:
    """The energy that each voxel's weight multiplies; its mean is the diffusion energy.

    Away from the border this is the sum over components and axes of the squared differences, over d²: with
    ``weight_at="upper"`` of the difference to the voxel before, with "edge" of half of those to both neighbours. Near
    the border there are fewer differences, and each of the N - 1 along an axis counts N / (N - 1) times as much.

    Args:
        ddf: (B, d, *S), voxels.
        penalty, spacing, weight_at: as for :class:`SpatiallyWeightedDiffusion`.

    Returns:
        (B, 1, *S), without a gradient.
    """
    diffusion = Diffusion(penalty, spacing, weight_at=weight_at)
    field = as_float(ddf.detach())
    with torch.enable_grad(), full_precision(ddf.device):
        ones = field.new_ones((field.shape[0], 1, *field.shape[2:])).requires_grad_()
        # The energy is linear in the weights, so its gradient is what each of them multiplies.
        (slope,) = torch.autograd.grad(diffusion(field, ones), ones)
    return slope * ones.numel()


def _number(name: str, option: str, value: float, least: float) -> float:
    """The value as a float, when it is a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise ValueError(f"{name}: {option} must be a number of at least {least:g}, got {value!r}")
    return float(value)


def _per_item(name: str, option: str, value: Tensor | float, like: Tensor) -> Tensor:
    """The value as one number for all items, (1,), or one for each, (B,)."""
    if not isinstance(value, Tensor):
        return like.new_full((1,), value)
    values = value.to(like).reshape(-1)
    if len(values) not in (1, len(like)):
        raise ValueError(f"{name}: {option} needs one number, or one for each of {len(like)} items, got {len(values)}")
    return values


def _check_map(name: str, weight_map: Tensor) -> None:
    if not isinstance(weight_map, Tensor):
        raise TypeError(f"{name}: weight_map must be a tensor, got {type(weight_map).__name__}")
    if weight_map.ndim < 3 or weight_map.shape[1] != 1:
        raise ValueError(f"{name}: weight_map must be (B, 1, *S), got shape {tuple(weight_map.shape)}")
