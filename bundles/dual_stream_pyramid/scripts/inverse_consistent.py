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
"""Decoder of DP-ConvIC-MF and DP-ConvIC-C: forward and inverse field from one pass, exchanged when the inputs are.

Both fields are composed of two halves. Going coarse to fine, each level measures how far the halfway images still are
apart, as seen from either side: fields A and B. Neither side is preferred: one half is moved on by ``A o inverse(B)``,
the other by ``B o inverse(A)``. In the end ``forward = L o Ri`` and ``inverse = R o Li``, where Li and Ri are inverses
of the halves L and R, built beside them.

Both directions of all pairs share one batch in the convolutions and in the inversion. Every sum is written such that
exchanging the images exchanges its terms, so the fields are exchanged to the last bit.
Source: Honkamaa and Marttinen, SITReg (2023), with the dual-stream pyramid's encoder and correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.networks import (
    both_ways,
    convolve,
    is_large,
    local_correlation,
    normalize_and_activate,
    residual_by_slabs,
)
from common.networks.fixed_point import invert_implicit
from common.spatial import bspline_displacement, compose, contraction_bound, warp

from .heads import PredictionHead

__all__ = ["Halves", "InverseConsistentDecoder", "SymmetricHead", "at_feature_centres"]

_INPUTS = ("mf", "c")


class Halves(NamedTuple):
    """The two halves of a pair's fields, (B, d, *S) in voxels, and their inverses."""

    left: Tensor
    right: Tensor
    left_inverse: Tensor
    right_inverse: Tensor

    @classmethod
    def start(cls, ab: Tensor, ba: Tensor) -> Halves:
        """The halves after the first level, from ``A o inverse(B)`` and ``B o inverse(A)``."""
        return cls(ab, ba, ba, ab)

    def advance(self, displacement: Tensor, inverse: Tensor, ab: Tensor, ba: Tensor) -> Halves:
        """Append a level: ``L o A o iB``, ``R o B o iA`` and their inverses ``B o iA o Li``, ``A o iB o Ri``.

        Args:
            displacement: A and B, one after the other, (2B, d, *S).
            inverse: iA and iB, (2B, d, *S).
            ab: ``A o iB``.
            ba: ``B o iA``.
        """
        (a, b), (inverse_a, inverse_b) = displacement.chunk(2), inverse.chunk(2)
        return Halves(
            compose(self.left, ab),
            compose(self.right, ba),
            compose(b, compose(inverse_a, self.left_inverse)),
            compose(a, compose(inverse_b, self.right_inverse)),
        )

    def whole(self) -> tuple[Tensor, Tensor]:
        """Forward and inverse field."""
        return compose(self.left, self.right_inverse), compose(self.right, self.left_inverse)


class SymmetricHead(PredictionHead):
    """A prediction head for two inputs that are each other's halves exchanged: cat(a, b) and cat(b, a).

    The first convolutions are linear: with their weights as (P, Q), ``P a + Q b`` and ``P b + Q a`` are sum and
    difference of ``(P + Q)/2 (a + b)`` and ``(P - Q)/2 (a - b)``, which takes half of the multiplications.
    """

    def both(self, total: Tensor, difference: Tensor) -> Tensor:
        """Motion seen from either side, one after the other: (2B, d, *S), float32.

        Args:
            total: a + b, (B, in_channels / 2, *S).
            difference: a - b, of the same shape.
        """
        block, shape = self.block, total.shape[2:]
        if is_large(total, block.conv1.out_channels):

            def read(first: int, last: int) -> Tensor:
                return torch.cat((total[:, :, first:last], difference[:, :, first:last]), dim=1)

            sides = residual_by_slabs(block, read, shape, _both_sides_of_rows)
            return torch.cat([self.flow_of(side) for side in sides])
        y = torch.cat(_both_sides(block.conv1, total, difference))
        y = block.conv2(normalize_and_activate((y, block.norm1), slope=block.slope, overwrite=True))
        if torch.is_grad_enabled():
            # The skip is as little work as it is much memory: it is computed a second time in the backward pass.
            skip = checkpoint(self._skip, total, difference, use_reentrant=False, preserve_rng_state=False)
            return self.flow_of(F.leaky_relu_(block.norm2(y).add_(skip), block.slope))
        skip = torch.cat(_both_sides(block.skip, total, difference))
        branches = (y, block.norm2), (skip, block.skip_norm)
        return self.flow_of(normalize_and_activate(*branches, slope=block.slope, overwrite=True))

    def _skip(self, total: Tensor, difference: Tensor) -> Tensor:
        skip: Tensor = self.block.skip_norm(torch.cat(_both_sides(self.block.skip, total, difference)))
        return skip


class InverseConsistentDecoder(nn.Module):
    """Forward and inverse displacement from the features of two images.

    Args:
        spatial_dims: 2 or 3.
        feature_channels: of the encoder, fine to coarse.
        head_channels: of the prediction heads, fine to coarse.
        inputs: what a head sees: "mf" both feature maps, "c" their local correlation, both ways.
        strides: of the feature maps, fine to coarse; 1, 2, 4, ... if not given.
        bound: fraction of the bound on control points below which no level can fold.
        tolerance: of the inversion at each level, voxels of the image.
        max_iterations: of the inversion.
        checkpoint_heads: recompute the heads in the backward pass instead of keeping their activations: slower, and
            much less memory.

    Raises:
        ValueError: on unknown ``inputs``, a bound outside (0, 1), or numbers of levels that differ.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        feature_channels: Sequence[int] = (16, 32, 32, 64, 64),
        head_channels: Sequence[int] = (32, 64, 64, 128, 128),
        *,
        inputs: str = "mf",
        strides: Sequence[int] | None = None,
        bound: float = 0.99,
        tolerance: float = 1e-2,
        max_iterations: int = 50,
        checkpoint_heads: bool = False,
    ) -> None:
        super().__init__()
        if inputs not in _INPUTS:
            raise ValueError(f"inputs must be one of {_INPUTS}, got {inputs!r}")
        if not 0 < bound < 1:
            raise ValueError(f"bound must be between 0 and 1, got {bound}")
        self.strides = tuple(strides) if strides else tuple(2**level for level in range(len(feature_channels)))
        if not len(feature_channels) == len(head_channels) == len(self.strides):
            raise ValueError(
                f"one number a level, got feature_channels {tuple(feature_channels)}, "
                f"head_channels {tuple(head_channels)}, strides {self.strides}"
            )
        self.spatial_dims, self.inputs = spatial_dims, inputs
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.checkpoint_heads = checkpoint_heads
        self.bounds = tuple(bound * contraction_bound(stride, spatial_dims) for stride in self.strides)
        seen = [2 * 3**spatial_dims] * len(head_channels) if inputs == "c" else [2 * c for c in feature_channels]
        self.heads = nn.ModuleList(SymmetricHead(spatial_dims, *c) for c in zip(seen, head_channels, strict=True))

    def forward(
        self,
        moving_features: list[Tensor],
        fixed_features: list[Tensor],
        size: Sequence[int],
        *,
        pyramid: bool = False,
        release: bool = False,
    ) -> dict[str, Any]:
        """Register a pair.

        Args:
            moving_features: (B, C, *s) each, fine to coarse, with s the size of the image over the stride, rounded up.
            fixed_features: of the other image.
            size: of the image.
            pyramid: also return the fields as they stand after every level, coarse to fine.
            release: empty the two lists on the way, so that the memory of a map is free after its level.

        Returns:
            "ddf" and "inverse_ddf" (B, d, *size), float32; "inversion_iterations" and "inversion_residual"
            (B, 2, levels) of both directions, coarse to fine; if asked, "pyramid" and "inverse_pyramid".

        Raises:
            ValueError: when a feature map has not the size that belongs to its stride.

        Warns:
            UserWarning: when an inversion did not converge.
        """
        self._check(moving_features, fixed_features, size)
        moving_left, fixed_left = (x if release else list(x) for x in (moving_features, fixed_features))
        halves: Halves | None = None
        stages, iterations, residuals = [], [], []
        for level in reversed(range(len(self.strides))):
            # The maps are handed on without a name of their own here, so that the callee may let go of them.
            points = self._control_points(level, moving_left.pop(), fixed_left.pop(), halves)
            displacement = bspline_displacement(points, self.strides[level], size)
            found = invert_implicit(displacement, self.tolerance, max_iterations=self.max_iterations)
            iterations.append(torch.stack(found.iterations.chunk(2), dim=1))
            residuals.append(torch.stack(found.residual.chunk(2), dim=1))
            halves = _advance(halves, displacement, found.value)
            del points, displacement, found
            if pyramid or level == 0:
                stages.append(halves.whole())
        ddfs, inverses = [list(fields) for fields in zip(*stages, strict=True)]
        result: dict[str, Any] = {
            "ddf": ddfs[-1],
            "inverse_ddf": inverses[-1],
            "inversion_iterations": torch.stack(iterations, dim=2),
            "inversion_residual": torch.stack(residuals, dim=2),
        }
        return {**result, "pyramid": ddfs, "inverse_pyramid": inverses} if pyramid else result

    def _control_points(self, level: int, a: Tensor, b: Tensor, halves: Halves | None) -> Tensor:
        """Bounded control points of A and B, one after the other, (2B, d, *s) in voxels of the level."""
        maps = [b, a]
        del a, b
        if halves is not None:
            stride, shape = self.strides[level], maps[0].shape[2:]
            for index, half in enumerate((halves.right, halves.left)):
                maps[index] = warp(maps[index], at_feature_centres(half, stride, shape) / stride)
        return self.bounds[level] * torch.tanh(self._motion(level, maps.pop(), maps.pop()))

    def _motion(self, level: int, a: Tensor, b: Tensor) -> Tensor:
        """What the head of a level says of the maps a and b, seen from either side, (2B, d, *s)."""
        if self.inputs == "c":
            a = local_correlation(a, b)
            b = both_ways(a)
        head, total = self.heads[level], a + b
        # Correlations are this function's own, so they may be overwritten.
        difference = a.sub_(b) if self.inputs == "c" and not torch.is_grad_enabled() else a - b
        del a, b
        if self.checkpoint_heads and torch.is_grad_enabled():
            motion: Tensor = checkpoint(head.both, total, difference, use_reentrant=False)
            return motion
        return head.both(total, difference)

    def _check(self, moving: Sequence[Tensor], fixed: Sequence[Tensor], size: Sequence[int]) -> None:
        for name, features in (("moving", moving), ("fixed", fixed)):
            shapes = [tuple(level.shape[2:]) for level in features]
            expected = [tuple(-(-n // stride) for n in size) for stride in self.strides]
            if shapes != expected:
                raise ValueError(f"{name} features of an image of size {tuple(size)} are {expected}, got {shapes}")


def at_feature_centres(ddf: Tensor, factor: int, shape: Sequence[int]) -> Tensor:
    """A field at the centres of blocks of voxels: voxel ``factor * k + (factor - 1) / 2`` for k in ``shape``.

    If the factor is even, that is between two voxels an axis, whose mean is taken. Beyond the grid its border counts.

    Args:
        ddf: (B, d, *S).
        factor: voxels an axis in a block.
        shape: how many blocks.

    Returns:
        (B, d, *shape), still in voxels of the fine grid.
    """
    if factor == 1 and tuple(ddf.shape[2:]) == tuple(shape):
        return ddf
    for axis, count in enumerate(shape, start=2):
        starts = factor * torch.arange(count, device=ddf.device)
        low, high = (
            ddf.index_select(axis, (starts + shift).clamp_max(ddf.shape[axis] - 1))
            for shift in ((factor - 1) // 2, factor // 2)
        )
        ddf = (low + high) / 2
    return ddf


def _advance(halves: Halves | None, displacement: Tensor, inverse: Tensor) -> Halves:
    (a, b), (inverse_a, inverse_b) = displacement.chunk(2), inverse.chunk(2)
    ab, ba = compose(a, inverse_b), compose(b, inverse_a)
    return Halves.start(ab, ba) if halves is None else halves.advance(displacement, inverse, ab, ba)


def _both_sides(layer: nn.Module, total: Tensor, difference: Tensor) -> list[Tensor]:
    """A convolution of cat(a, b) and of cat(b, a), from a + b and a - b."""
    padding = layer.weight.shape[-1] // 2
    return _sum_and_difference(layer, total, difference, (padding,) * (total.ndim - 2))


def _both_sides_of_rows(layer: nn.Module, rows: Tensor) -> list[Tensor]:
    """The same, from rows of cat(a + b, a - b) that bring their neighbours along."""
    reach = layer.weight.shape[-1] // 2
    total, difference = (rows if reach else rows[:, :, 1:-1]).chunk(2, dim=1)
    return _sum_and_difference(layer, total, difference, (0,) + (reach,) * (rows.ndim - 3))


def _sum_and_difference(layer: nn.Module, total: Tensor, difference: Tensor, padding: tuple[int, ...]) -> list[Tensor]:
    front, back = layer.weight.chunk(2, dim=1)
    even = convolve(total, (front + back) / 2, layer.bias, padding=padding)
    odd = convolve(difference, (front - back) / 2, padding=padding)
    return [even + odd, even.sub_(odd)]
