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
"""GraDIRN: gradient descent on the similarity, unrolled from coarse to fine, with a learned regulariser in every step.

Source: Qiu, Hammernik, Qin, Chen and Rueckert, Embedding gradient-based optimization in image registration networks
(MICCAI 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.losses.checks import as_float, check_choice
from common.networks import RegistrationNetwork, as_tuple, split_pair
from common.spatial import resample_field
from common.spatial.exporting import same_size

from .energies import build_energy
from .regulariser import Regulariser
from .step import Step

__all__ = ["GraDIRN"]


class GraDIRN(RegistrationNetwork):
    """Gradient steps on a similarity, each corrected by a small network, on one image resolution after another.

    The coarsest level starts from zero, every other one from the field of the level before it. A level's images are
    resampled straight from the full resolution (linear, centres of the outermost voxels aligned) to half the size of
    the next finer level, rounded down. See :class:`~.step.Step` for a step.

    Nothing is differentiated automatically at inference, so ``torch.inference_mode`` will do. Training differentiates
    the gradient steps too, second derivatives of the similarity included.

    ``fields`` gives "ddf" and, if asked for, "pyramid": the fields as they stand after each level, coarse to fine, on
    the image's grid; the last of them is the ddf.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of cat(moving, fixed).
        similarity: "ssd", "ncc" (whole images) or "lncc" (local), see :mod:`.energies`.
        levels: resolutions.
        steps: steps at each level; one number, or one a level from coarse to fine.
        shared: the steps of a level share their step size and regulariser; False gives each step its own.
        images: what a regulariser sees besides the field: "explicit" the fixed and the moved image, "implicit" the
            fixed and the moving image, "none" neither.
        step_size: step size before training. By default 5 / (1 + number of all steps) for "ssd", 0.5 for nine, and a
            fifth of that for the correlations, whose gradients are larger by about the inverse of a variance.
        learn_step_size: learn the step sizes.
        use_similarity: descend the similarity's gradient; without it the network is its regularisers alone.
        use_regulariser: have regularisers; without them the network is plain gradient descent.
        channels: of the regularisers.
        layers: of the regularisers.
        update: "additive" adds a step's update u to the field; "diffeomorphic" puts the motion exp(u), which does not
            fold, before it: ``x + u(x)`` becomes the flow along u for unit time, and the field is composed with it.
        window: of "lncc", voxels.
        checkpointing: keep no activations of the steps but the last; compute them again for the backward pass.
        pyramid: give the fields of all levels.

    Raises:
        ValueError: for an unknown choice, fewer than one level or step, or neither similarity nor regulariser.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 2,
        similarity: str = "ssd",
        levels: int = 3,
        steps: int | Sequence[int] = 3,
        shared: bool = True,
        images: str = "explicit",
        step_size: float | None = None,
        learn_step_size: bool = True,
        use_similarity: bool = True,
        use_regulariser: bool = True,
        channels: int = 32,
        layers: int = 5,
        update: str = "additive",
        window: int = 9,
        checkpointing: bool = False,
        pyramid: bool = False,
    ) -> None:
        super().__init__(spatial_dims)
        if levels < 1:
            raise ValueError(f"levels must be at least 1, got {levels}")
        if not (use_similarity or use_regulariser):
            raise ValueError("use_similarity and use_regulariser are both false: no step would change the field")
        check_choice("GraDIRN", "images", images, ("explicit", "implicit", "none"))
        check_choice("GraDIRN", "update", update, ("additive", "diffeomorphic"))
        self.counts = as_tuple(steps, levels, "steps")
        self.in_channels, self.checkpointing, self.pyramid = in_channels, checkpointing, pyramid
        energy = build_energy(similarity, window=window) if use_similarity else None
        seen = spatial_dims + (0 if images == "none" else in_channels)

        def step() -> Step:
            return Step(
                energy,
                Regulariser(spatial_dims, seen, channels, layers) if use_regulariser else None,
                images=images,
                step_size=(5.0 if similarity == "ssd" else 1.0) / (1 + sum(self.counts))
                if step_size is None
                else step_size,
                learn_step_size=learn_step_size,
                update=update,
            )

        self.levels = nn.ModuleList(
            nn.ModuleList(step() for _ in range(1 if shared else count)) for count in self.counts
        )

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class.

        Raises:
            ValueError: when ``image`` is not such a pair, or its number of channels is not ``in_channels``.
        """
        moving, fixed = split_pair(as_float(image), self.spatial_dims)
        if image.shape[1] != self.in_channels:
            raise ValueError(f"image has {image.shape[1]} channels; the network was built for {self.in_channels}")
        size, count = tuple(moving.shape[2:]), len(self.levels)
        ddf, found = None, []
        for level, steps in enumerate(self.levels):
            shape = [max(1, n // 2 ** (count - 1 - level)) for n in size]
            if ddf is None:
                ddf = moving.new_zeros((len(moving), self.spatial_dims, *shape))
            else:
                ddf = resample_field(ddf, shape, align_corners=True)
            ddf = self._descend(steps, level, ddf, _resample(moving, shape), _resample(fixed, shape))
            if self.pyramid:
                found.append(resample_field(ddf, size, align_corners=True))
        return {"ddf": ddf, "pyramid": found} if self.pyramid else {"ddf": ddf}

    def _descend(self, steps: Any, level: int, ddf: Tensor, moving: Tensor, fixed: Tensor) -> Tensor:
        """All steps of one level."""
        for index in range(self.counts[level]):
            step = steps[index % len(steps)]
            # The backward pass begins with the last step, whose activations would be there again at once.
            last = level == len(self.counts) - 1 and index == self.counts[level] - 1
            if self.checkpointing and torch.is_grad_enabled() and not last:
                ddf = checkpoint(step, ddf, moving, fixed, use_reentrant=False, preserve_rng_state=False)
            else:
                ddf = step(ddf, moving, fixed)
        return ddf


def _resample(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image (B, C, *S) on a grid of ``size`` voxels, the outermost centres aligned."""
    if same_size(image.shape[2:], size):
        return image
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(image, size=tuple(size), mode=mode, align_corners=True)
