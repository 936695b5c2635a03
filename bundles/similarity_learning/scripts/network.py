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
"""Registration of a pair as the fit of a distribution of transformations, in the place of a network's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.networks import RegistrationNetwork, split_pair
from common.spatial.exporting import exporting

from .inner_loop import InnerLoop
from .posterior import LowRankGaussian
from .regularisation import DifferenceEnergy
from .similarity import Similarity
from .smoothing import SobolevSmoothing
from .transformation import build_transformation
from .uncertainty import displacement_std, total_std
from .variational import VariationalProblem

__all__ = ["PublishedSetting", "VariationalRegistration", "published_setting"]


class PublishedSetting(NamedTuple):
    """What the authors used for brains of 128³ voxels.

    Attributes:
        weight: of the regularisation.
        learning_rate: of q(v).
        iterations: of q(v).
    """

    weight: float
    learning_rate: float
    iterations: int


_SETTINGS = {
    ("svf", "ssd"): PublishedSetting(1.8, 0.01, 1024),
    ("svf", "lcc"): PublishedSetting(2.8, 0.02, 1344),
    ("bspline", "ssd"): PublishedSetting(1.4, 0.01, 1024),
    ("bspline", "lcc"): PublishedSetting(2.0, 0.01, 1024),
}


def published_setting(transformation: str, similarity: str) -> PublishedSetting:
    """The authors' setting of a combination.

    Args:
        transformation: "svf" or "bspline".
        similarity: "ssd" or "lcc".

    Raises:
        ValueError: for another combination.
    """
    if (transformation, similarity) not in _SETTINGS:
        raise ValueError(f"no setting for {(transformation, similarity)}; there are {sorted(_SETTINGS)}")
    return _SETTINGS[transformation, similarity]


class VariationalRegistration(RegistrationNetwork):
    """Register by fitting q(v) to the pair; what is learnt, if anything, is the similarity.

    ``fields`` runs the inner loop and gives

    - "ddf" (B, d, *S), of the mean velocity, and "velocity" (B, d, *S), both in voxels;
    - with ``samples``: "ddf_samples" (B, K, d, *S), "ddf_std" (B, d, *S), their standard deviation about their mean,
      and "uncertainty" (B, 1, *S), the root of the sum of the components' variances, all in voxels;
    - "energy" (B, 1), data energy plus regularisation of the mean's field;
    - with ``inverse``: "inverse_ddf" (B, d, *S), of the negative mean velocity.

    The state dict has the weights of the similarity alone (``similarity.…``), and is empty if it is not learnt. A pair
    gives the same result every time; in a batch with others the noise differs, and with it, slightly, the result.
    Images are to be in [0, 1].

    Attributes:
        problem: the energies, with the similarity of this network.
        inner_loop: how they are minimised.
        fixed_mask: voxels of the fixed images that count, (1 or B, 1, *S), or None for all; see
            :class:`~.masks.MaskFromBatch`.

    Args:
        spatial_dims: 2 or 3.
        similarity: "ssd" or "lcc".
        learnt: compare maps of a network instead of the images.
        window: half-width of the box of "lcc", voxels.
        channels: of the similarity's network.
        train_lcc_kernel: see :class:`~.similarity.Similarity`.
        normalised: divide the data energy by the number of voxels that count.
        transformation: "svf", a velocity in every voxel, or "bspline".
        steps: squarings.
        control_spacing: voxels between control points of "bspline", one number or one an axis.
        integration_factor: of the grid that is integrated on.
        rank: low-rank factors of q(v).
        sigma: standard deviation that q(v) begins with, voxels; None is that of the regularisation alone, which is
            where most of it ends, and saves about half of the iterations.
        factor: height that the factors begin with, voxels.
        weight: of the regularisation; the published one for the transformation and similarity if not given.
        edge_weight: see :class:`~.regularisation.DifferenceEnergy`.
        smoothing: half-width of the Sobolev kernel; 0 is none.
        smoothing_strength: of the Sobolev kernel.
        smoothing_gradient: "straight_through" or "exact", see :class:`~.smoothing.SobolevSmoothing`.
        noise: half-width of the uniform noise of fields while q(v) is fitted, voxels.
        iterations: of the inner loop; the published number if not given.
        learning_rate: of the inner loop; the published one if not given.
        levels: of the inner loop, see :class:`~.inner_loop.InnerLoop`.
        level_iterations: of the inner loop.
        start: of the inner loop, a registration network with "velocity". Its weights are not of this network.
        tolerance: of the inner loop.
        progress: show the inner loop's progress.
        samples: fields drawn from q(v), mirrored pairs; 0 for none.
        seed: of the inner loop and the samples.
        inverse: give "inverse_ddf".

    Raises:
        ValueError: for an unknown choice or a number out of range.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        similarity: str = "ssd",
        learnt: bool = False,
        window: int = 1,
        channels: Sequence[int] = (4, 8, 8),
        train_lcc_kernel: bool = False,
        normalised: bool = False,
        transformation: str = "svf",
        steps: int = 12,
        control_spacing: int | Sequence[int] = 2,
        integration_factor: int = 1,
        rank: int = 1,
        sigma: float | None = 0.5,
        factor: float = 0.1,
        weight: float | None = None,
        edge_weight: float = 1.0,
        smoothing: int = 3,
        smoothing_strength: float = 0.5,
        smoothing_gradient: str = "straight_through",
        noise: float = 0.1,
        iterations: int | None = None,
        learning_rate: float | None = None,
        levels: Sequence[int] = (1,),
        level_iterations: Sequence[int] | None = None,
        start: RegistrationNetwork | None = None,
        tolerance: float | None = None,
        progress: bool = False,
        samples: int = 8,
        seed: int = 0,
        inverse: bool = False,
    ) -> None:
        super().__init__(spatial_dims)
        if samples < 0 or samples == 1:
            raise ValueError(f"samples must be 0, or at least 2 for a standard deviation, got {samples}")
        self.samples, self.seed, self.inverse = samples, seed, inverse
        self.fixed_mask: Tensor | None = None
        self.similarity = Similarity(
            similarity, learnt, spatial_dims, channels, window, train_lcc_kernel=train_lcc_kernel, normalised=normalised
        )
        built = build_transformation(transformation, steps, control_spacing, integration_factor)
        usual = published_setting(transformation, similarity)
        self.problem = VariationalProblem(
            self.similarity,
            built,
            SobolevSmoothing(smoothing, smoothing_strength, smoothing_gradient),
            DifferenceEnergy(usual.weight if weight is None else weight, edge_weight),
            noise,
        )
        self.inner_loop = InnerLoop(
            usual.iterations if iterations is None else iterations,
            usual.learning_rate if learning_rate is None else learning_rate,
            levels,
            level_iterations,
            start,
            tolerance,
            progress,
            rank=rank,
            sigma=sigma,
            factor=factor,
        )

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Register each pair of ``image`` (B, 2, *S); see the class.

        Raises:
            ValueError: when ``image`` is no such pair, or ``fixed_mask`` does not fit it.
            NonFiniteLossError: when an energy is no number.
            NotImplementedError: when the network is being exported.
        """
        if exporting():
            raise NotImplementedError(
                "a fit of q(v) is no fixed sequence of operations: it draws noise, differentiates and may end early. "
                "PublishedVoxelMorph, trained with this similarity, can be exported"
            )
        moving, fixed = split_pair(self.padded(image, 1), self.spatial_dims)
        if moving.shape[1] != 1:
            raise ValueError(f"images of one channel are registered; this pair has {image.shape[1]} channels, not 2")
        mask = None if self.fixed_mask is None else self.fixed_mask.to(fixed.device) > 0
        generator = torch.Generator(moving.device).manual_seed(self.seed)
        posterior = self.inner_loop.fit(self.problem, moving, fixed, mask, generator=generator).posterior
        with torch.no_grad():
            found = self._of_mean(posterior, moving, fixed, mask)
            return {**found, **self._of_samples(posterior, moving.shape[2:], generator)}

    def _of_mean(
        self, posterior: LowRankGaussian, moving: Tensor, fixed: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        transformation = self.problem.transformation
        velocity = transformation.dense(self.problem.smoothing(posterior.mean), moving.shape[2:])
        found = {"ddf": transformation.integrate(velocity), "velocity": velocity}
        if self.inverse:
            found["inverse_ddf"] = transformation.integrate(-velocity)
        reference = self.similarity.reference(fixed, mask)
        found["energy"] = self.problem.mean_energy(posterior, moving, reference).unsqueeze(1)
        return {name: value.detach() for name, value in found.items()}

    def _of_samples(
        self, posterior: LowRankGaussian, size: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Fields without the noise of the fit, and how they scatter."""
        if not self.samples:
            return {}
        drawn = posterior.samples(self.samples, generator).unbind(1)
        fields = torch.stack([self.problem.displacement(sample, size) for sample in drawn], dim=1)
        # Of mirrored pairs the mean is known, but for what is not linear: it costs no degree of freedom.
        std = displacement_std(fields)
        return {"ddf_samples": fields, "ddf_std": std, "uncertainty": total_std(std)}
