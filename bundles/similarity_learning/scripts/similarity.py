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
"""Sums of squared differences and local correlation of images, or of what a learnt network makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses.checks import check_choice

from .encoder import FeatureEncoder

__all__ = ["KINDS", "Reference", "Similarity"]

KINDS = ("ssd", "lcc")
_EPS = 1e-5  # added to the product of two local variances


class Reference(NamedTuple):
    """What a similarity needs of the fixed images, computed once for as long as its weights stay.

    Attributes:
        fixed: the images or their maps, (R, 1, *S), float32.
        centred: less their local mean, (R, 1, *S); None for "ssd".
        variance: the sum of squares of that over each box, (R, 1, *S); None for "ssd".
        mask: voxels that count, (1 or R, 1, *S) bool; None for all.
        count: their number in each image, (1 or R,).
    """

    fixed: Tensor
    centred: Tensor | None
    variance: Tensor | None
    mask: Tensor | None
    count: Tensor


class Similarity(nn.Module):
    """The data term of the model: energies of moved images, one a image, and the maps that they sum.

    "ssd": half the sum of z = (f - m)². "lcc": minus the sum of z = c² / (ab + 1e-5), with sums c, a and b over a box
    around each voxel of the products of f - f̄ and m - m̄. The local means are those at each voxel, not at the box's
    centre, and images go on beyond their edge with their last value: so written in the published model.

    Args:
        kind: "ssd" or "lcc".
        learnt: compare maps that a network makes of both images; else the images themselves.
        spatial_dims: 2 or 3.
        channels: of the network.
        window: half-width s of the box of "lcc", which has 2s + 1 voxels along each axis.
        train_lcc_kernel: the weights of the box are parameters, as in the published learnt "lcc"; sums are divided by
            the number of voxels in the box whatever they become.
        normalised: divide energies by the number of voxels that count, so that weights do not depend on the size.
    """

    def __init__(
        self,
        kind: str = "ssd",
        learnt: bool = False,
        spatial_dims: int = 3,
        channels: Sequence[int] = (4, 8, 8),
        window: int = 1,
        train_lcc_kernel: bool = False,
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.kind = check_choice("Similarity", "kind", kind, KINDS)
        if train_lcc_kernel and kind != "lcc":
            raise ValueError(f"Similarity: train_lcc_kernel is an option of kind 'lcc', but the kind is {kind!r}")
        self.window, self.normalised, self.spatial_dims = window, normalised, spatial_dims
        self.encoder = FeatureEncoder(spatial_dims, 1, channels) if learnt else None
        ones = torch.ones(1, 1, *(2 * window + 1,) * spatial_dims)
        self.kernel = nn.Parameter(ones) if train_lcc_kernel else None

    @property
    def learnt(self) -> bool:
        """Whether there is a network."""
        return self.encoder is not None

    def reference(self, fixed: Tensor, mask: Tensor | None = None) -> Reference:
        """What is to be kept of fixed images.

        Args:
            fixed: (R, 1, *S), one for all moved images or one for each.
            mask: (1 or R, 1, *S) bool, voxels that count; None for all.
        """
        fixed, centred, variance = self._encode(fixed), None, None
        if self.kind == "lcc":
            centred = fixed - self._box(fixed) / self._voxels
            variance = self._box(centred * centred)
        count = torch.full((1,), float(fixed[0].numel()), device=fixed.device)
        if mask is not None:
            mask = mask.bool()
            count = mask.flatten(1).sum(1).float()
        return Reference(fixed, centred, variance, mask, count)

    def map(self, reference: Reference, moved: Tensor) -> Tensor:
        """The summed quantity z at each voxel.

        Args:
            reference: of R fixed images.
            moved: (nR, 1, *S), n blocks of R images.

        Returns:
            (nR, 1, *S), float32, whatever the mask.
        """
        blocks = (-1, *reference.fixed.shape)
        moved = self._encode(moved)
        if self.kind == "ssd":
            return (moved.view(blocks) - reference.fixed).square().view(moved.shape)
        assert reference.centred is not None and reference.variance is not None
        centred = moved - self._box(moved) / self._voxels
        cross = self._box((centred.view(blocks) * reference.centred).view(moved.shape))
        variance = self._box(centred * centred).view(blocks) * reference.variance
        return cross.square() / (variance.view(moved.shape) + _EPS)

    def energy(self, reference: Reference, moved: Tensor) -> Tensor:
        """Energies of moved images, less for more similar ones.

        Args:
            reference: of R fixed images.
            moved: (nR, 1, *S), n blocks of R images.

        Returns:
            (nR,), float32.
        """
        z = self.map(reference, moved).view(-1, *reference.fixed.shape)
        if reference.mask is not None:
            z = z * reference.mask
        sums = (0.5 if self.kind == "ssd" else -1.0) * z.flatten(2).sum(2)
        return (sums / reference.count if self.normalised else sums).flatten()

    @property
    def _voxels(self) -> int:
        return int((2 * self.window + 1) ** self.spatial_dims)

    def _encode(self, image: Tensor) -> Tensor:
        return image.float() if self.encoder is None else self.encoder(image)

    def _box(self, x: Tensor) -> Tensor:
        """Sums over the box around each voxel, (N, 1, *S); the image goes on beyond its edge with its last value."""
        convolve = F.conv2d if self.spatial_dims == 2 else F.conv3d
        kernel = self.kernel
        if kernel is None:
            kernel = x.new_ones(1, 1, *(2 * self.window + 1,) * self.spatial_dims)
        with torch.autocast(x.device.type, enabled=False):
            return convolve(F.pad(x, (self.window,) * (2 * self.spatial_dims), mode="replicate"), kernel)
