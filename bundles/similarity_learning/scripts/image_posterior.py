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
"""q_f: a Gaussian over images, which stands in for the model's own distribution of fixed images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, full_precision

from .low_rank import half_energies, low_rank_deviation, standard_draws
from .posterior import LowRankGaussian
from .smoothing import smoothed, sobolev_kernel

__all__ = ["ImageGaussian"]

_HALF_WIDTH = 7


class ImageGaussian(nn.Module):
    """N(fixed, S (diag(exp(log_var)) + sum_r factors_r factors_rᵀ) Sᵀ), one for all pairs of an atlas.

    The mean is the atlas and nothing to learn: it is not in the state dict. S is the identity, or smooths with a
    Sobolev kernel: neighbouring voxels of an image are alike.

    Args:
        fixed: (1, 1, *S), in [0, 1].
        sigma: the diagonal's standard deviation at the start.
        factor: height of the factors at the start.
        rank: how many factors.
        smoothing: strength of the Sobolev kernel S; 0 is none.

    Raises:
        ValueError: for anything but one image of one channel.
    """

    mean: Tensor

    def __init__(
        self, fixed: Tensor, sigma: float = 0.1, factor: float = 0.1, rank: int = 1, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if fixed.ndim not in (4, 5) or fixed.shape[:2] != (1, 1):
            raise ValueError(f"ImageGaussian: the fixed image must be (1, 1, *S), got {tuple(fixed.shape)}")
        mean = as_float(fixed.detach())
        start = LowRankGaussian.initial(1, mean.shape[2:], 1, rank, sigma, factor, mean=mean).state()
        self.register_buffer("mean", mean, persistent=False)
        self.log_var = nn.Parameter(start["log_var"])
        self.factors = nn.Parameter(start["factors"])
        self.taps = sobolev_kernel(_HALF_WIDTH, smoothing)[_HALF_WIDTH:]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Variances of the diagonal are at most 1, and factors in [-1, 1]; to be called before every draw."""
        self.log_var.clamp_(max=0.0)
        self.factors.clamp_(-1.0, 1.0)

    def draw(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Standard normal numbers for one pair of images.

        Args:
            generator: where they come from, on any device; PyTorch's own one if not given.

        Returns:
            noise (1, 1, *S) and coefficients (1, rank).
        """
        return standard_draws(self.log_var, self.factors, generator)

    def deviation(self, noise: Tensor, coefficients: Tensor) -> Tensor:
        """An image's distance from the mean.

        Args:
            noise: (1, 1, *S).
            coefficients: (1, rank).

        Returns:
            (1, 1, *S), float32.
        """
        with full_precision(self.log_var.device):
            deviation = low_rank_deviation(self.log_var, self.factors, noise, coefficients)
            return deviation if self.taps[0] == 1.0 else smoothed(deviation, self.taps)

    def pair(self, noise: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Two images that are mirrored at the mean but for what leaves [0, 1], which is cut off.

        Args:
            noise: (1, 1, *S).
            coefficients: (1, rank).

        Returns:
            (1, 1, *S) each, float32.
        """
        deviation = self.deviation(noise, coefficients)
        return (self.mean + deviation).clamp(0.0, 1.0), (self.mean - deviation).clamp(0.0, 1.0)

    def half_log_determinant(self) -> Tensor:
        """Half the logarithm of the determinant of the covariance but for S, (1,): the entropy without constants."""
        with full_precision(self.log_var.device):
            return half_energies(self.log_var, self.factors, torch.zeros_like(self.log_var))[0]
