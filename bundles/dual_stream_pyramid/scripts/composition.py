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
"""The decoder that refines one displacement from coarse to fine, and the two ways to predict a level's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks import convolution, convolve_by_slabs, is_large, local_correlation, vector_field_attention
from common.spatial import compose, resample_field, warp

from .heads import PredictionHead

__all__ = ["MATCHES", "AttentionStep", "CompositionDecoder", "ConvolutionStep", "enlarge", "match_channels"]


def _features(moving: Tensor, fixed: Tensor, radius: int) -> tuple[Tensor, ...]:
    return moving, fixed


def _features_and_correlation(moving: Tensor, fixed: Tensor, radius: int) -> tuple[Tensor, ...]:
    return moving, local_correlation(fixed, moving, radius), fixed


def _correlation(moving: Tensor, fixed: Tensor, radius: int) -> tuple[Tensor, ...]:
    return (local_correlation(fixed, moving, radius),)


#: What a head sees of a level, by the name of the match: a function of moving and fixed features and the radius, to
#: maps whose channels follow one another.
MATCHES: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]] = {
    "mf": _features,
    "mfc": _features_and_correlation,
    "c": _correlation,
}


def match_channels(match: str, channels: int, radius: int, spatial_dims: int) -> int:
    """Channels of a match of maps with ``channels`` channels."""
    offsets = (2 * radius + 1) ** spatial_dims
    return {"mf": 2 * channels, "mfc": 2 * channels + offsets, "c": offsets}[match]


class ConvolutionStep(nn.Module):
    """A level's step by convolutions on what is known of the level.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the moving map.
        channels: of the head's residual block.
        match: what the head sees: "mf" both maps, "c" their local correlation, "mfc" all three.
        radius: of the correlation, in voxels.

    Raises:
        ValueError: on an unknown match.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: int, *, match: str = "c", radius: int = 1
    ) -> None:
        super().__init__()
        if match not in MATCHES:
            raise ValueError(f"match must be one of {sorted(MATCHES)}, got {match!r}")
        self.match, self.radius = match, radius
        self.head = PredictionHead(spatial_dims, match_channels(match, in_channels, radius, spatial_dims), channels)

    def compare(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, ...]:
        """What the head sees of the maps (B, C, *S)."""
        return MATCHES[self.match](moving, fixed, self.radius)

    def predict(self, *maps: Tensor) -> Tensor:
        """What :meth:`compare` found to a step (B, d, *S) in voxels."""
        step: Tensor = self.head(*maps)
        return step

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Maps (B, C, *S) to a step (B, d, *S) in voxels."""
        return self.predict(*self.compare(moving, fixed))


class AttentionStep(nn.Module):
    """A level's step as the mean offset to the neighbours that fit best, of at most ``radius`` voxels an axis.

    One convolution brings both maps into the space in which they are compared. It does so beyond the border too, where
    the moving map repeats its outermost voxels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of either map.
        channels: of the space of comparison.
        radius: of the neighbourhood, in voxels.
    """

    def __init__(self, spatial_dims: int, in_channels: int, channels: int, *, radius: int = 1) -> None:
        super().__init__()
        self.radius = radius
        self.projection = convolution(spatial_dims, in_channels, channels)

    def compare(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys from the maps (B, C, *S)."""
        pads = (self.radius,) * (2 * (moving.ndim - 2))
        if not is_large(moving, moving.shape[1]):
            return self.projection(fixed), self.projection(F.pad(moving, pads, mode="replicate"))

        def wider(first: int, last: int) -> Tensor:
            rows = torch.arange(first, last, device=moving.device).sub_(self.radius).clamp_(0, moving.shape[2] - 1)
            widened = F.pad(moving.index_select(2, rows), (*pads[2:], 0, 0), mode="replicate")
            return widened

        size = moving.shape[2:]
        keys = convolve_by_slabs(self.projection, wider, [n + 2 * self.radius for n in size])
        return convolve_by_slabs(self.projection, lambda first, last: fixed[:, :, first:last], size), keys

    def predict(self, query: Tensor, key: Tensor) -> Tensor:
        """What :meth:`compare` found to a step (B, d, *S) in voxels."""
        return vector_field_attention(query, key, self.radius)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Maps (B, C, *S) to a step (B, d, *S) in voxels."""
        return self.predict(*self.compare(moving, fixed))


class CompositionDecoder(nn.Module):
    """From coarse to fine: move the moving features by the field so far, predict a step, compose.

    Args:
        steps: one a level, fine to coarse: ``compare`` is given the moved and the fixed features, and ``predict`` what
            came of that.
    """

    def __init__(self, steps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

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
            moving_features: (B, C, *s) each, fine to coarse.
            fixed_features: of the other image.
            size: of the image.
            pyramid: also return the fields as they stand after every level, coarse to fine.
            release: empty the two lists on the way, so that the memory of a map is free after its level.

        Returns:
            "ddf" (B, d, *size), float32; if asked, "pyramid": a list of such fields, the last of which is the ddf.

        Raises:
            ValueError: when there is not one feature map a level.
        """
        if not len(moving_features) == len(fixed_features) == len(self.steps):
            raise ValueError(
                f"{len(self.steps)} levels need as many maps, got {len(moving_features)} and {len(fixed_features)}"
            )
        moving_left, fixed_left = (x if release else list(x) for x in (moving_features, fixed_features))
        stages: list[Tensor] = []
        for step in reversed(self.steps):
            moving, fixed = moving_left.pop(), fixed_left.pop()
            so_far = enlarge(stages[-1], fixed.shape[2:]) if stages else None
            if so_far is not None:
                moving = warp(moving, so_far)
            maps = step.compare(moving, fixed)
            del moving, fixed
            ddf = step.predict(*maps)
            del maps
            if not pyramid:
                stages.clear()
            stages.append(ddf if so_far is None else compose(so_far, ddf))
        ddf = enlarge(stages[-1], size)
        if not pyramid:
            return {"ddf": ddf}
        return {"ddf": ddf, "pyramid": [enlarge(stage, size) for stage in stages[:-1]] + [ddf]}


def enlarge(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """A field on a finer grid, as published: corners stay on corners, values double with the number of voxels.

    A level's voxels lie at every second voxel of the next, not quite where the corners put them. The levels learn to
    make up for that, so weights fit one rule only.
    """
    if tuple(ddf.shape[2:]) == tuple(size):
        return ddf
    scale = [new / old for new, old in zip(size, ddf.shape[2:], strict=True)]
    return resample_field(ddf, size, align_corners=True, scale=scale)
