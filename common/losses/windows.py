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
"""Means, variances and covariances of two images in sliding windows, without cancellation.

The textbook form E[x²] - E[x]² loses every digit in float32 once an image's local mean exceeds a few thousand times
its local deviation; variances then come out negative and correlations outside [-1, 1]. Here the statistics of a window
are merged from those of smaller windows by the rule of Chan, Golub and LeVeque ("Updating formulae and a pairwise
algorithm for computing sample variances", 1979): spreads add, plus the squared distance of the two means. Nothing is
ever subtracted from a spread, so it is never negative, exactly 0 where the image is constant, and rounding is in
proportion to the local mean over the local deviation, not to its square. A box of k voxels along an axis
is merged from windows of 1, 2, 4, ... voxels, in log2(k) steps; axes follow one another, as the windows are separable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True)
class Kernel:
    """A separable window: a box of ones, or a sampled Gaussian whose weights add up to 1.

    Args:
        size: voxels along every axis, odd.
        sigma: the Gaussian's standard deviation in voxels; None is the box.
    """

    size: int
    sigma: float | None = None
    taps: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.sigma is None:
            taps = [1.0] * self.size
        else:
            bell = [math.exp(-0.5 * ((k - self.radius) / self.sigma) ** 2) for k in range(self.size)]
            taps = [weight / math.fsum(bell) for weight in bell]
        object.__setattr__(self, "taps", tuple(taps))

    @property
    def radius(self) -> int:
        """Voxels on either side of the centre."""
        return self.size // 2


class Moments(NamedTuple):
    """Weighted statistics of windows, one window a voxel.

    Attributes:
        weight: Σw: a number when all windows weigh the same, else (1, N, *P).
        mean: (2, N, *P), of the first and of the second image.
        spread: (3, N, *P), Σw(a - ā)², Σw(b - b̄)² and Σw(a - ā)(b - b̄); None is all 0, as in windows of one voxel.
    """

    weight: float | Tensor
    mean: Tensor
    spread: Tensor | None

    def narrow(self, axis: int, start: int, size: int) -> Moments:
        """The windows ``start`` ... ``start + size - 1`` along a tensor axis."""
        weight, mean, spread = self
        return Moments(
            weight.narrow(axis, start, size) if isinstance(weight, Tensor) else weight,
            mean.narrow(axis, start, size),
            None if spread is None else spread.narrow(axis, start, size),
        )


def window_moments(images: Tensor, weight: float | Tensor, kernel: Kernel) -> Moments:
    """Statistics of every window that lies inside the given (padded) images.

    Args:
        images: (2, N, *P).
        weight: how much each voxel counts, 1.0 or (1, N, *P) not negative.
        kernel: the window.

    Returns:
        statistics for the P - size + 1 windows along each axis.
    """
    moments = Moments(weight, images, None)
    for axis in range(2, images.ndim):
        moments = _gaussian_axis(moments, axis, kernel) if kernel.sigma else _box_axis(moments, axis, kernel.size)
    return moments


def window_sums(maps: Tensor, kernel: Kernel) -> Tensor:
    """Weighted sums over every window that lies inside the given (padded) maps.

    Args:
        maps: (K, N, *P).
        kernel: the window.

    Returns:
        (K, N, *(P - size + 1)).
    """
    for axis in range(2, maps.ndim):
        if kernel.sigma is None:
            maps = _doubling(maps, axis, kernel.size, Tensor.narrow, torch.add)
        else:
            size = maps.shape[axis] - kernel.size + 1
            total = maps.narrow(axis, 0, size) * kernel.taps[0]
            for k in range(1, kernel.size):
                total.add_(maps.narrow(axis, k, size), alpha=kernel.taps[k])
            maps = total
    return maps


def merge(first: Moments, second: Moments, scale: float = 1.0) -> Moments:
    """Statistics of two disjoint windows together, the second one's weights times ``scale``."""
    added = second.weight * scale
    weight = first.weight + added
    # A window without weight has any mean; 0 / tiny keeps it at the first one's.
    share = added / (weight.clamp_min(torch.finfo(weight.dtype).tiny) if isinstance(weight, Tensor) else weight)
    apart = second.mean - first.mean
    mean = torch.lerp(first.mean, second.mean, share)
    spread = _add_scaled(first.spread, second.spread, scale)
    return Moments(weight, mean, _add_between(spread, apart, first.weight * share))


def _add_scaled(first: Tensor | None, second: Tensor | None, scale: float) -> Tensor | None:
    """first + scale * second in a new tensor, where None is 0."""
    if second is None:
        return None if first is None else first.clone()
    return second * scale if first is None else torch.add(first, second, alpha=scale)


def _add_between(spread: Tensor | None, apart: Tensor, coefficient: float | Tensor) -> Tensor:
    """Add what the distance of two means gives, coefficient * apart², to a spread that may be overwritten."""
    if spread is not None and not isinstance(coefficient, Tensor):
        spread[:2].addcmul_(apart, apart, value=coefficient)
        spread[2].addcmul_(apart[0], apart[1], value=coefficient)
        return spread
    scaled = apart * coefficient
    if spread is None:
        spread = apart.new_empty((3, *apart.shape[1:]))
        torch.mul(scaled, apart, out=spread[:2])
        torch.mul(scaled[0], apart[1], out=spread[2])
    else:
        spread[:2].addcmul_(scaled, apart)
        spread[2].addcmul_(scaled[0], apart[1])
    return spread


def _box_axis(moments: Moments, axis: int, size: int) -> Moments:
    """Windows of ``size`` neighbours along one axis."""
    return _doubling(moments, axis, size, Moments.narrow, merge, moments.mean.shape[axis])


def _gaussian_axis(moments: Moments, axis: int, kernel: Kernel) -> Moments:
    """Gaussian windows along one axis, merged tap by tap."""
    size = moments.mean.shape[axis] - kernel.size + 1
    first = moments.narrow(axis, 0, size)
    spread = None if first.spread is None else first.spread * kernel.taps[0]
    total = Moments(first.weight * kernel.taps[0], first.mean, spread)
    for k in range(1, kernel.size):
        total = merge(total, moments.narrow(axis, k, size), kernel.taps[k])
    return total


def _doubling(
    unit: _T,
    axis: int,
    size: int,
    narrow: Callable[[_T, int, int, int], _T],
    join: Callable[[_T, _T], _T],
    extent: int | None = None,
) -> _T:
    """Join ``size`` neighbours along an axis: windows of 1, 2, 4, ... are joined where the size's binary digit is 1.

    Args:
        unit: what stands at each place.
        axis: the tensor axis.
        size: how many neighbours.
        narrow: takes ``unit``, axis, start and length.
        join: makes one window of two adjoining ones.
        extent: places along the axis; read from the tensor when left out.
    """
    places = unit.shape[axis] if extent is None else extent  # type: ignore[attr-defined]
    power, length, done, total = unit, 1, 0, None
    while True:
        if size & length:
            if total is None:
                total = power
            else:
                count = places - done - length + 1
                total = join(narrow(total, axis, 0, count), narrow(power, axis, done, count))
            done += length
        if done == size:
            assert total is not None
            return total
        count = places - 2 * length + 1
        power = join(narrow(power, axis, 0, count), narrow(power, axis, length, count))
        length *= 2
