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
"""Two scans as a pyramid: intensities brought to [0, 1], then pooled to voxels of about the same size in mm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, pad

__all__ = ["Level", "Side", "levels", "prepare"]

_SAMPLE = 2**18  # voxels that percentiles are taken of
_COARSEST = 24  # voxels along the foreground at the coarsest level
_FINEST = {2: 2**16, 3: 2**18}  # voxels of the foreground's box at the finest
_SMOOTH = 0.6  # standard deviation of the smoothing, in voxels of the level
_MARGIN = 2  # voxels of the level around the foreground


@dataclass(frozen=True)
class Side:
    """One of the two scans.

    Attributes:
        image: (1, 1, *S) float32 in [0, 1].
        affine: (d+1, d+1) float64, voxel to world.
        mask: (1, 1, *S) float32, what counts; None where all does.
        foreground: (1, 1, *S) float32, 1 in what is brighter than the background and in the mask.
        centre: (d,) its centre of mass in mm.
        radius: root mean square distance from it, in mm.
        middle: (d,) of the grid in mm.
    """

    image: Tensor
    affine: np.ndarray
    mask: Tensor | None
    foreground: Tensor
    centre: np.ndarray
    radius: float
    middle: np.ndarray


@dataclass(frozen=True)
class Level:
    """Both scans at one resolution; the fixed one is cut to the box of its foreground.

    Attributes:
        size: of a voxel in mm.
        fixed: with its foreground.
        moving: the whole of it.
    """

    size: float
    fixed: Side
    moving: Side


def prepare(image: Tensor, affine: np.ndarray, mask: Tensor | None, name: str) -> Side:
    """Normalise a scan: the background to 0, the 99th percentile of the foreground to 1.

    Args:
        image: (1, 1, *S), any real dtype.
        affine: (d+1, d+1), voxel to world.
        mask: (1, 1, *S); what is not 0 counts. None for all.
        name: what to call the scan in an error.

    Raises:
        ValueError: for another shape, a matrix that does not fit or is singular, values that are not finite, an empty
            mask, or a constant image; the message names what was found.
    """
    dims = image.dim() - 2
    if dims not in (2, 3) or tuple(image.shape[:2]) != (1, 1) or image.numel() == 0:
        raise ValueError(f"{name} must be (1, 1, H, W) or (1, 1, H, W, D), found {tuple(image.shape)}")
    if affine.shape != (dims + 1, dims + 1) or not abs(np.linalg.det(affine)) > 1e-12:
        raise ValueError(
            f"{name}_affine must be an invertible {dims + 1}x{dims + 1} matrix for {name} {tuple(image.shape)}, "
            f"found {affine.tolist()}"
        )
    image = image.detach().float()
    bad = int(image.numel() - torch.isfinite(image).sum())
    if bad:
        raise ValueError(f"{name} has {bad} values of {image.numel()} that are not finite")
    mask = None if mask is None else _checked_mask(mask, image, name)
    values = image[mask > 0] if mask is not None else image.flatten()
    values = values[:: max(1, values.numel() // _SAMPLE)]
    low, top = (float(v) for v in torch.quantile(values, values.new_tensor([0.005, 0.999])))
    if not top > low:
        low, top = float(image.min()), float(image.max())
    if not top > low:
        raise ValueError(f"{name} is constant: every voxel is {low:g}, so there is nothing to align")
    threshold = low + 0.05 * (top - low)
    bright = values[values > threshold]
    high = float(torch.quantile(bright, 0.99)) if bright.numel() else top
    image = ((image - low) / (max(high, threshold) - low)).clamp_(0.0, 1.0)
    foreground = (image > 0.05).float()
    if mask is not None:
        foreground = foreground * (mask > 0)
    if not bool(foreground.any()):
        raise ValueError(f"{name} is constant inside its mask, at {low:g}: there is nothing to align")
    centre, radius = _moments(image * foreground, affine)
    middle = affine[:-1, :-1] @ ((np.array(image.shape[2:]) - 1) / 2) + affine[:-1, -1]
    return Side(image, affine, mask, foreground, centre, radius, middle)


def levels(fixed: Side, moving: Side, finest: float | None = None) -> list[Level]:
    """From coarse to fine, the voxels of each level half as large as those before.

    Args:
        fixed: at full resolution.
        moving: at full resolution.
        finest: voxel size in mm of the last level; chosen by default, so that it has a bounded number of voxels.
    """
    dims = len(fixed.centre)
    low, high = _box(fixed.foreground)
    spacing = np.linalg.norm(fixed.affine[:-1, :-1], axis=0)
    extent = (high - low) * spacing
    if finest is None:
        finest = max(float(spacing.min()), float(math.prod(extent) / _FINEST[dims]) ** (1 / dims))
    sizes = [finest]
    while float(extent.max()) / sizes[-1] >= math.sqrt(2) * _COARSEST:
        sizes.append(2 * sizes[-1])
    pairs = []
    for size in sizes:  # each from the finer one
        fixed, moving = _pooled(fixed, size), _pooled(moving, size)
        pairs.append(Level(size, _cut(_smoothed(fixed, size)), _smoothed(moving, size)))
    return pairs[::-1]


def _checked_mask(mask: Tensor, image: Tensor, name: str) -> Tensor:
    if mask.shape != image.shape:
        raise ValueError(f"{name}_mask must be as {name}, {tuple(image.shape)}, found {tuple(mask.shape)}")
    mask = (mask.detach().to(image.device) > 0).float()
    if not bool(mask.any()):
        raise ValueError(f"{name}_mask is empty: not one of its {mask.numel()} voxels is above 0")
    return mask


def _moments(weight: Tensor, affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre of mass, and the root mean square distance from it, in mm."""
    dims = weight.dim() - 2
    total = weight.sum(dtype=torch.float64)
    first, second = np.zeros(dims), np.zeros((dims, dims))
    axes = [torch.arange(n, dtype=torch.float64, device=weight.device) for n in weight.shape[2:]]
    marginal = {}
    for a in range(dims):
        rest = tuple(k + 2 for k in range(dims) if k != a)
        marginal[a] = weight.sum(rest, dtype=torch.float64).flatten() / total
        first[a] = float(marginal[a] @ axes[a])
        second[a, a] = float(marginal[a] @ axes[a] ** 2) - first[a] ** 2
    for a in range(dims):
        for b in range(a + 1, dims):
            rest = tuple(k + 2 for k in range(dims) if k not in (a, b))
            joint = (weight.sum(rest, dtype=torch.float64) if rest else weight.double())[0, 0] / total
            second[a, b] = second[b, a] = float(axes[a] @ joint @ axes[b]) - first[a] * first[b]
    linear = affine[:-1, :-1]
    centre = linear @ first + affine[:-1, -1]
    spread = float(np.trace(linear @ second @ linear.T))
    return centre, math.sqrt(max(spread, float(np.linalg.norm(linear, axis=0).min()) ** 2))


def _pooled(side: Side, size: float) -> Side:
    """Voxels averaged, along each axis as many as come nearest to a size in mm."""
    spacing = np.linalg.norm(side.affine[:-1, :-1], axis=0)
    counts = [max(1, min(round(size / s), n)) for s, n in zip(spacing, side.image.shape[2:], strict=True)]
    if max(counts) == 1:
        return side
    affine = side.affine.copy()
    affine[:-1, -1] += side.affine[:-1, :-1] @ ((np.array(counts) - 1) / 2)
    affine[:-1, :-1] *= np.array(counts)
    mask = None if side.mask is None else _pool(side.mask, counts)
    image, foreground = _inside(side.image, side.mask, lambda v: _pool(v, counts)), _pool(side.foreground, counts)
    return replace(side, image=image, affine=affine, mask=mask, foreground=foreground)


def _pool(image: Tensor, counts: Sequence[int]) -> Tensor:
    """Averages over blocks; an incomplete last block is filled up with the border."""
    short = [-n % count for n, count in zip(image.shape[2:], counts, strict=True)]
    if any(short):
        image = pad(image, [v for s in reversed(short) for v in (0, s)], mode="replicate")
    return (avg_pool2d if image.dim() == 4 else avg_pool3d)(image, tuple(counts))


def _smoothed(side: Side, size: float) -> Side:
    """The image smoothed alike in all directions, which voxels coarser than the level's are already."""
    sigmas = [_SMOOTH * size / float(spacing) for spacing in np.linalg.norm(side.affine[:-1, :-1], axis=0)]

    def smooth(values: Tensor) -> Tensor:
        for axis, sigma in enumerate(sigmas, start=2):
            if sigma > 0.25 and values.shape[axis] > 1:
                values = _gaussian(values, sigma, axis)
        return values

    return replace(side, image=_inside(side.image, side.mask, smooth))


def _inside(image: Tensor, mask: Tensor | None, average: Callable[[Tensor], Tensor]) -> Tensor:
    """Averages of what the mask holds: beyond it may be anything, and must not be smeared over the border."""
    if mask is None:
        return average(image)
    return average(image * mask) / average(mask).clamp_min(1e-6)


def _gaussian(image: Tensor, sigma: float, axis: int) -> Tensor:
    """Smooth along an axis; sums rather than a convolution, which a GPU might run in TF32."""
    radius = max(1, math.ceil(2.5 * sigma))
    weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-radius, radius + 1)]
    count = image.shape[axis]
    index = torch.arange(-radius, count + radius, device=image.device).clamp_(0, count - 1)
    wide = image.index_select(axis, index)
    out = torch.zeros_like(image)
    for k, weight in enumerate(weights):
        out.add_(wide.narrow(axis, k, count), alpha=weight / sum(weights))
    return out


def _box(foreground: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last voxel of the foreground along each axis."""
    low, high = [], []
    for axis in range(2, foreground.dim()):
        rest = tuple(k for k in range(foreground.dim()) if k != axis)
        inside = (foreground > 0).any(rest[0], keepdim=True)
        for k in rest[1:]:
            inside = inside.any(k, keepdim=True)
        where = inside.flatten().nonzero().flatten()
        low.append(int(where[0]))
        high.append(int(where[-1]) + 1)
    return np.array(low), np.array(high)


def _cut(side: Side) -> Side:
    """The box of the foreground, with a margin."""
    low, high = _box(side.foreground)
    low, high = np.maximum(low - _MARGIN, 0), np.minimum(high + _MARGIN, np.array(side.image.shape[2:]))
    where = (slice(None), slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)))
    affine = side.affine.copy()
    affine[:-1, -1] += side.affine[:-1, :-1] @ low
    mask = None if side.mask is None else side.mask[where].contiguous()
    cut, foreground = side.image[where].contiguous(), side.foreground[where].contiguous()
    return replace(side, image=cut, affine=affine, mask=mask, foreground=foreground)
