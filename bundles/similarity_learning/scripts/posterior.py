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
"""q(v): a Gaussian over the parameters of a transformation, with a covariance of a diagonal plus low rank.

For each image q(v) = N(mean, D + U Uᵀ), D = diag(exp(log_var)), and the R columns of U are ``factors``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from common.losses.checks import full_precision

from .low_rank import half_energies, low_rank_deviation, standard_draws

__all__ = ["LowRankGaussian"]

_NAMES = ("mean", "log_var", "factors")


class LowRankGaussian(nn.Module):
    """A Gaussian over velocities for each image of a batch, of which no two share anything.

    Args:
        mean: (B, d, *L), in voxels.
        log_var: (B, d, *L), logarithms of the diagonal's variances in voxels².
        factors: (B, R, d, *L), in voxels.

    Raises:
        ValueError: when the shapes disagree.
    """

    def __init__(self, mean: Tensor, log_var: Tensor, factors: Tensor) -> None:
        super().__init__()
        fits = factors.ndim == mean.ndim + 1 and (factors.shape[0], *factors.shape[2:]) == tuple(mean.shape)
        if log_var.shape != mean.shape or not fits:
            raise ValueError(
                f"mean and log_var must be (B, d, *L) and factors (B, R, d, *L), "
                f"got {tuple(mean.shape)}, {tuple(log_var.shape)} and {tuple(factors.shape)}"
            )
        self.mean = nn.Parameter(mean)
        self.log_var = nn.Parameter(log_var)
        self.factors = nn.Parameter(factors)

    @classmethod
    def initial(
        cls,
        batch: int,
        size: Sequence[int],
        spatial_dims: int,
        rank: int = 1,
        sigma: float = 0.5,
        factor: float = 0.1,
        mean: Tensor | None = None,
    ) -> LowRankGaussian:
        """What optimisation starts from.

        The first factor is constant, as published. Equal factors would stay equal for ever, so further ones are the
        next cosine modes of the grid, of the same height.

        Args:
            batch: how many images.
            size: of the lattice of parameters.
            spatial_dims: components of a parameter.
            rank: how many factors.
            sigma: the diagonal's standard deviation in voxels.
            factor: height of the factors in voxels.
            mean: (batch, spatial_dims, *size); 0 if not given. Its device is the result's.

        Raises:
            ValueError: when a number is out of range or ``mean`` has another shape.
        """
        shape = (batch, spatial_dims, *size)
        if min(shape) < 1 or rank < 0 or sigma <= 0:
            raise ValueError(
                f"sizes and sigma must be positive, rank not negative: {shape}, sigma {sigma}, rank {rank}"
            )
        if mean is not None and tuple(mean.shape) != shape:
            raise ValueError(f"mean must be {shape}, got {tuple(mean.shape)}")
        device = None if mean is None else mean.device
        start = torch.zeros(shape) if mean is None else mean.detach().float().clone()
        log_var = torch.full(shape, 2 * math.log(sigma), device=device)
        modes = (factor * _cosine_modes(rank, size)).to(log_var)
        factors = modes[None, :, None].expand(batch, rank, *shape[1:]).contiguous()
        return cls(start, log_var, factors)

    @property
    def rank(self) -> int:
        """How many factors an image has."""
        return self.factors.shape[1]

    def draw(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Standard normal numbers for one sample an image.

        Args:
            generator: where they come from, on any device; PyTorch's own one if not given.

        Returns:
            noise (B, d, *L) and coefficients (B, R), one an image and factor.
        """
        return standard_draws(self.log_var, self.factors, generator)

    def deviation(self, noise: Tensor, coefficients: Tensor) -> Tensor:
        """A sample's distance from the mean, ``noise * exp(log_var / 2) + sum_r coefficients_r * factors_r``.

        Args:
            noise: (B, d, *L).
            coefficients: (B, R).

        Returns:
            (B, d, *L), in voxels.
        """
        with full_precision(self.mean.device):
            return low_rank_deviation(self.log_var, self.factors, noise, coefficients)

    def antithetic(self, deviation: Tensor) -> Tensor:
        """The samples ``mean + deviation`` of all images, then ``mean - deviation`` of all, (2B, d, *L)."""
        return torch.cat((self.mean + deviation, self.mean - deviation))

    def samples(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Antithetic pairs of samples; of an odd number the last one stands alone.

        Returns:
            (B, count, d, *L), in voxels.

        Raises:
            ValueError: when ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        drawn = []
        for _ in range(-(-count // 2)):
            deviation = self.deviation(*self.draw(generator))
            drawn += [self.mean + deviation, self.mean - deviation]
        return torch.stack(drawn[:count], dim=1)

    def marginal_std(self) -> Tensor:
        """The standard deviation of every parameter, (B, d, *L), in voxels."""
        return torch.sqrt(torch.exp(self.log_var) + self.factors.square().sum(1))

    def half_log_determinant(self) -> Tensor:
        """Half the logarithm of the covariance's determinant, (B,): the entropy without its constant."""
        return self.half_energies(torch.zeros_like(self.mean))[0]

    def half_mahalanobis(self, deviation: Tensor) -> Tensor:
        """Half the squared distance from the mean in the metric of the covariance, (B,); the same for ``-deviation``.

        Args:
            deviation: (B, d, *L), a sample's distance from the mean. Gradients flow to it too, as published.
        """
        return self.half_energies(deviation)[1]

    def half_energies(self, deviation: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`half_log_determinant` and :meth:`half_mahalanobis`, in one pass over the parameters."""
        with full_precision(self.mean.device):
            determinant, distance = half_energies(self.log_var, self.factors, deviation)
            return determinant, distance

    def resized(
        self,
        size: Sequence[int],
        factor_per_axis: Sequence[float],
        *,
        spacing: Sequence[float] | float = 1.0,
        origin: float = 0.0,
    ) -> LowRankGaussian:
        """The same distribution on a finer (or coarser) grid of voxels, by linear interpolation.

        Parameter j of an axis lies at voxel ``spacing * (j - origin)``. The outer faces of the voxel grids coincide, as
        after average pooling: voxel x of this grid is at ``factor * (x + 0.5) - 0.5`` of the new one. Velocities grow
        with the number of voxels: ``mean`` and ``factors`` are multiplied by the factor of their component, and
        ``log_var`` has twice its logarithm added.

        Args:
            size: of the new lattice of parameters.
            factor_per_axis: voxels of the new grid in one of this grid, along each axis.
            spacing: voxels between parameters, on either grid.
            origin: the parameter that lies in voxel 0.

        Returns:
            a distribution of its own, on this one's device.
        """
        lattice = self.mean.shape[2:]
        spacings = [float(spacing)] * len(lattice) if isinstance(spacing, (int, float)) else list(spacing)
        weights = []
        for old, new, factor, step in zip(lattice, size, factor_per_axis, spacings, strict=True):
            voxel = step * (torch.arange(new, dtype=torch.float64) - origin)
            weights.append(_linear_weights(((voxel + 0.5) / factor - 0.5) / step + origin, old))
        scale = self.mean.new_tensor(tuple(factor_per_axis)).view(-1, *(1,) * len(lattice))
        with torch.no_grad(), full_precision(self.mean.device):
            mean, log_var, factors = (_resample(tensor, weights) for tensor in (self.mean, self.log_var, self.factors))
            return LowRankGaussian(mean * scale, log_var + 2 * scale.log(), factors * scale)

    def state(self) -> dict[str, Tensor]:
        """The three tensors by name, detached; they share memory with the parameters."""
        return {name: getattr(self, name).detach() for name in _NAMES}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LowRankGaussian:
        """A distribution from :meth:`state`, in float32, of copies of the tensors.

        Raises:
            KeyError: when a tensor is missing.
        """
        missing = [name for name in _NAMES if name not in state]
        if missing:
            raise KeyError(f"the state of a distribution needs {list(_NAMES)}, got {sorted(state)}")
        return cls(*(state[name].detach().to(torch.float32, copy=True) for name in _NAMES))

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        return f"shape={tuple(self.mean.shape)}, rank={self.rank}"


def _cosine_modes(count: int, size: Sequence[int]) -> Tensor:
    """(count, *size): the constant 1, then products of ``cos(pi k (i + 0.5) / n)`` by growing frequency."""
    reach = range(count + 1)
    frequencies = sorted(itertools.product(reach, repeat=len(size)), key=lambda k: (sum(f * f for f in k), k))
    modes = torch.ones(count, *size)
    for mode, frequency in zip(modes, frequencies, strict=False):
        for axis, (n, f) in enumerate(zip(size, frequency, strict=True)):
            wave = torch.cos(math.pi * f * (torch.arange(n) + 0.5) / n)
            mode.mul_(wave.view([-1 if k == axis else 1 for k in range(len(size))]))
    return modes


def _linear_weights(position: Tensor, count: int) -> Tensor:
    """(positions, count): weights of linear interpolation between neighbours 0 ... count - 1, repeated beyond."""
    position = position.clamp(0, count - 1)
    low = position.floor().clamp(max=max(count - 2, 0)).long()
    part = position - low
    weights = torch.zeros(len(position), count, dtype=torch.float64)
    weights.scatter_(1, low[:, None], (1 - part)[:, None])
    weights.scatter_add_(1, (low + 1).clamp(max=count - 1)[:, None], part[:, None])
    return weights


def _resample(values: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Apply a matrix (new, old) along each of the last axes."""
    first = values.ndim - len(weights)
    for axis, matrix in enumerate(weights, first):
        values = torch.movedim(torch.tensordot(values, matrix.to(values), dims=([axis], [1])), -1, axis)
    return values.contiguous()
