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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, check_choice, plain

from .boxes import Box
from .encoder import FeatureEncoder

__all__ = ["KINDS", "Reference", "Similarity"]

KINDS = ("ssd", "lcc")
_EPS = 1e-5  # added to the product of two local variances


class Reference(NamedTuple):
    """What a similarity needs of the fixed images, computed once for as long as its weights stay.

    Attributes:
        fixed: the images or their maps, (R, 1, *S), float32.
        centred: less their local mean, (R, 1, *S); None for "ssd".
        spread: the sum of squares of that over each box, (R, 1, *S); None for "ssd".
        mask: voxels that count, (1 or R, 1, *S) bool; None for all.
        count: their number in each image, (1 or R,).
    """

    fixed: Tensor
    centred: Tensor | None
    spread: Tensor | None
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

    Raises:
        ValueError: for another kind, a window without neighbours, or a trained box without "lcc".
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
        if window < 1:
            raise ValueError(f"Similarity: window must be at least 1, got {window}")
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

        Raises:
            ValueError: when the mask does not fit.
        """
        if mask is not None and (mask.shape[1:] != fixed.shape[1:] or len(mask) not in (1, len(fixed))):
            raise ValueError(
                f"Similarity: the mask has shape {tuple(mask.shape)}, which does not fit images {tuple(fixed.shape)}"
            )
        count = torch.full((1,), float(fixed[0].numel()), device=fixed.device)
        if mask is not None:
            mask = plain(mask).bool()
            count = mask.flatten(1).sum(1).clamp_min(1).float()
        maps, centred, spread = self._encode(fixed), None, None
        if self.kind == "lcc":
            box = self._box
            centred = maps - box.sum(maps) / self._voxels
            spread = box.sum(centred * centred)
        return Reference(maps, centred, spread, mask, count)

    def map(self, reference: Reference, moved: Tensor) -> Tensor:
        """The summed quantity z at each voxel, by ordinary operations.

        Args:
            reference: of R fixed images.
            moved: (nR, 1, *S), n blocks of R images.

        Returns:
            (nR, 1, *S), float32, whatever the mask.
        """
        moved = self._encode(moved)
        blocks = _blocks(moved, reference)
        if self.kind == "ssd":
            return (blocks - reference.fixed).square().view(moved.shape)
        assert reference.centred is not None and reference.spread is not None
        box = self._box
        centred = moved - box.sum(moved) / self._voxels
        cross = box.sum((_blocks(centred, reference) * reference.centred).view(moved.shape))
        product = _blocks(box.sum(centred * centred), reference) * reference.spread + _EPS
        return cross.square() / product.view(moved.shape)

    def energy(self, reference: Reference, moved: Tensor) -> Tensor:
        """Energies of moved images, less for more similar ones.

        Where gradients are asked for in the moved images alone, they are computed here already and are all that is
        kept: one map an image.

        Args:
            reference: of R fixed images.
            moved: (nR, 1, *S), n blocks of R images.

        Returns:
            (nR,), float32.
        """
        learns = reference.fixed.requires_grad or (self.kernel is not None and self.kernel.requires_grad)
        if learns and torch.is_grad_enabled():
            z = _masked(_blocks(self.map(reference, moved), reference), reference)
            sums = (0.5 if self.kind == "ssd" else -1.0) * z.flatten(2).sum(2).flatten()
        else:
            sums = _Energy.apply(self._encode(moved), reference, None if self.kind == "ssd" else self._box)
        if not self.normalised:
            return sums
        return (sums.view(-1, len(reference.fixed)) / reference.count).flatten()

    @property
    def _voxels(self) -> int:
        return int((2 * self.window + 1) ** self.spatial_dims)

    @property
    def _box(self) -> Box:
        return Box(self.window, self.kernel)

    def _encode(self, image: Tensor) -> Tensor:
        image = as_float(image)
        return image if self.encoder is None else self.encoder(image)


class _Energy(torch.autograd.Function):
    """The energies of maps and their gradients in closed form.

    With f and m less their local means, c = K(fm), a = K(m²), b = K(f²) and P = ab + eps, the gradient of -Σc²/P in m
    is f K'(-2c/P) + 2m K'(c²b/P²), where K sums over boxes and K' is its reverse; then m less its local mean is
    reversed. The fixed maps get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, moved: Tensor, reference: Reference, box: Box | None) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        if box is None:
            slope = _masked(_blocks(moved, reference) - reference.fixed, reference)
            sums = 0.5 * slope.square().flatten(2).sum(2)
        else:
            sums, slope = _correlate(moved, reference, box, wanted)
        if wanted:
            ctx.save_for_backward(slope.view(moved.shape))
        return sums.flatten()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].view(-1, *[1] * (slope.ndim - 1)), None, None


def _correlate(moved: Tensor, reference: Reference, box: Box, wanted: bool) -> tuple[Tensor, Tensor]:
    """Minus the summed local correlation (n, R) of maps (nR, 1, *S), and where wanted its gradient (nR, 1, *S)."""
    voxels = (2 * box.half_width + 1) ** (moved.ndim - 2)
    centred = moved - box.sum(moved) / voxels
    f, b, m = reference.centred, reference.spread, _blocks(centred, reference)
    assert f is not None and b is not None
    cross = _blocks(box.sum((m * f).view(moved.shape)), reference)
    product = _blocks(box.sum(centred * centred), reference) * b + _EPS
    ratio = _masked(cross / product, reference)
    sums = -(cross * ratio).flatten(2).sum(2)
    if not wanted:
        return sums, sums
    push = box.reverse((ratio.square() * b).view(moved.shape))
    pull = box.reverse(ratio.view(moved.shape))
    slope = 2.0 * (_blocks(push, reference) * m - _blocks(pull, reference) * f).view(moved.shape)
    return sums, slope - box.reverse(slope) / voxels


def _blocks(maps: Tensor, reference: Reference) -> Tensor:
    """Maps (nR, 1, *S) as (n, R, 1, *S)."""
    if len(maps) % len(reference.fixed) or maps.shape[1:] != reference.fixed.shape[1:]:
        raise ValueError(
            f"Similarity: moved images {tuple(maps.shape)} are no blocks of fixed ones {tuple(reference.fixed.shape)}"
        )
    return maps.reshape(-1, *reference.fixed.shape)


def _masked(blocks: Tensor, reference: Reference) -> Tensor:
    """Blocks (n, R, 1, *S), 0 where the mask is not."""
    return blocks if reference.mask is None else torch.where(reference.mask, blocks, 0.0)
