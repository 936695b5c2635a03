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
"""The variational problem of registering a pair: from parameters to a moved image, and the energies of q(v).

Source: Grzech et al., A variational Bayesian method for similarity learning in non-rigid image registration
(CVPR 2022). Parameters v are white; the field comes of their smoothed values S v:

    loss = E_q[data(fixed, moving o field(S v)) + regularisation(S v) + log q(v)]

estimated from two samples that are mirrored at the mean, and up to constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.spatial import warp

from .posterior import LowRankGaussian
from .similarity import Reference, Similarity
from .transformation import Transformation

__all__ = ["Draws", "Energies", "VariationalProblem"]


class Draws(NamedTuple):
    """All random numbers of one estimate of the energies.

    Attributes:
        noise: (B, d, *L), standard normal.
        coefficients: (B, R), standard normal.
        jitter: (2B, d, *S), voxels, added to the fields of both samples; None for none.
    """

    noise: Tensor
    coefficients: Tensor
    jitter: Tensor | None = None


class Energies(NamedTuple):
    """Energies of each image of a batch, (B,) each, up to constants.

    Attributes:
        data: of the two samples together.
        regularisation: of the two samples together.
        entropy: minus the mean of log q at the two samples.
        loss: ``data / 2 + regularisation / 2 - entropy``, the negative evidence lower bound.
    """

    data: Tensor
    regularisation: Tensor
    entropy: Tensor
    loss: Tensor


class VariationalProblem:
    """How parameters make a field, and what a distribution of them costs.

    Args:
        similarity: the data term.
        transformation: parameters on a lattice to fields.
        smoothing: makes white parameters smooth.
        regularisation: the energy of smooth parameters, one number an image.
        noise: half-width in voxels of the uniform numbers that are added to the field in every voxel while q(v) or the
            network is trained; 0 for none.

    Raises:
        ValueError: when ``noise`` is negative.
    """

    def __init__(
        self,
        similarity: Similarity,
        transformation: Transformation,
        smoothing: nn.Module,
        regularisation: nn.Module,
        noise: float = 0.1,
    ) -> None:
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.similarity, self.transformation = similarity, transformation
        self.smoothing, self.regularisation, self.noise = smoothing, regularisation, noise

    def to(self, device: torch.device | str) -> VariationalProblem:
        """Move the parts that have tensors, in place."""
        for part in (self.similarity, self.transformation, self.smoothing, self.regularisation):
            part.to(device)
        return self

    def displacement(self, lattice_values: Tensor, size: Sequence[int]) -> Tensor:
        """The field of white parameters: smoothed and integrated, without noise.

        Args:
            lattice_values: (N, d, *lattice), voxels a unit of time, such as a mean or samples of q(v).
            size: of the image.

        Returns:
            (N, d, *size), voxels.
        """
        field: Tensor = self.transformation(self.smoothing(lattice_values), size)
        return field

    def jitter(
        self, ddf: Tensor, generator: torch.Generator | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """A field with uniform noise in every voxel.

        Args:
            ddf: (N, d, *S), voxels.
            generator: where the noise comes from; PyTorch's own one if not given.
            noise: its half-width in voxels, this problem's if not given; or the noise itself, (N, d, *S).

        Returns:
            (N, d, *S), a tensor of its own unless there is no noise.
        """
        noise = self.noise if noise is None else noise
        if isinstance(noise, Tensor):
            return ddf + noise
        if not noise:
            return ddf
        if generator is not None and generator.device != ddf.device:
            drawn = torch.empty(ddf.shape, device=generator.device).uniform_(-noise, noise, generator=generator)
            return ddf + drawn.to(ddf.device)
        return torch.empty_like(ddf).uniform_(-noise, noise, generator=generator).add_(ddf)

    def fields(
        self,
        lattice_values: Tensor,
        size: Sequence[int],
        generator: torch.Generator | None = None,
        noise: float | Tensor | None = None,
    ) -> Tensor:
        """The field that training sees: :meth:`displacement`, then :meth:`jitter`; arguments as there."""
        return self.jitter(self.displacement(lattice_values, size), generator, noise)

    def energies(
        self,
        posterior: LowRankGaussian,
        moving: Tensor,
        reference: Reference,
        draws: Draws | None = None,
        generator: torch.Generator | None = None,
    ) -> Energies:
        """Estimate the energies from one antithetic pair of samples an image, both in one batch.

        Under autocast the similarity's network runs in half precision; every other part sees to its own float32.

        Args:
            posterior: of B images.
            moving: (B, 1, *S).
            reference: of the fixed images, from ``similarity.reference``.
            draws: the random numbers; drawn if not given.
            generator: where they are drawn from.

        Returns:
            four tensors (B,), differentiable in the posterior.
        """
        size = moving.shape[2:]
        noise, coefficients = posterior.draw(generator) if draws is None else draws[:2]
        deviation = posterior.deviation(noise, coefficients)
        smooth = self.smoothing(posterior.antithetic(deviation))
        regularisation = self.regularisation(smooth)
        ddf = self.transformation(smooth, size)
        if draws is None:
            ddf = self.jitter(ddf, generator)
        elif draws.jitter is not None:
            ddf = ddf + draws.jitter
        moved = warp(torch.cat((moving, moving)), ddf)
        determinant, distance = posterior.half_energies(deviation)
        data = self.similarity.energy(reference, moved)
        return _paired(data, regularisation, determinant + distance)

    @torch.no_grad()
    def mean_energy(self, posterior: LowRankGaussian, moving: Tensor, reference: Reference) -> Tensor:
        """Data energy plus regularisation of the mean's field, without noise, (B,).

        Args:
            posterior: of B images.
            moving: (B, 1, *S).
            reference: of the fixed images.
        """
        smooth = self.smoothing(posterior.mean)
        moved = warp(moving, self.transformation(smooth, moving.shape[2:]))
        roughness: Tensor = self.regularisation(smooth)
        return self.similarity.energy(reference, moved) + roughness

    def resting_sigma(self, spatial_dims: int) -> float:
        """The diagonal's standard deviation at which q(v) rests where the images say nothing, in voxels.

        There the loss is ``sigma² h / 2 - log(sigma)`` in each parameter, ``h`` being how the gradient of the
        regularisation at one parameter answers to that parameter, with the smoothing's own gradient; so sigma is
        ``h^-1/2``. Far from the border, which is good enough to start from: with the published weights it is 0.6 to
        0.9 voxels.

        Args:
            spatial_dims: of the images.

        Raises:
            ValueError: when nothing is regularised, so that there is no such number.
        """
        width = 25
        impulse = torch.zeros(1, spatial_dims, *(width,) * spatial_dims)
        middle = (0, 0, *(width // 2,) * spatial_dims)
        impulse[middle] = 1.0
        with torch.enable_grad():
            energy = self.regularisation(self.smoothing(impulse.requires_grad_())).sum()
            (answer,) = torch.autograd.grad(energy, impulse)
        precision = float(answer[middle])
        if precision <= 0:
            raise ValueError("the regularisation gives no standard deviation to start from: give a sigma, or a weight")
        return precision**-0.5


def _paired(data: Tensor, regularisation: Tensor, entropy: Tensor) -> Energies:
    """Energies of images from those of 2B samples and their densities."""
    both: list[Any] = [values.view(2, -1).sum(0) for values in (data, regularisation)]
    return Energies(*both, entropy, 0.5 * (both[0] + both[1]) - entropy)
