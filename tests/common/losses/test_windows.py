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
"""Window statistics against float64 sums over explicitly cut windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.losses.windows import Kernel, merge, window_moments, window_sums


def explicit(images: Tensor, weight: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, means and spreads by unfolding every window in float64."""
    dims = images.ndim - 2
    taps = torch.tensor(kernel.taps, dtype=torch.float64)
    window = taps
    for _ in range(dims - 1):
        window = window[..., None] * taps
    images, weight = images.double(), weight.double()
    for axis in range(2, 2 + dims):
        images, weight = images.unfold(axis, kernel.size, 1), weight.unfold(axis, kernel.size, 1)
    axes = tuple(range(-dims, 0))
    weight = weight * window
    total = weight.sum(axes)
    mean = (images * weight).sum(axes) / total.clamp_min(1e-30)
    apart = images - mean[(...,) + (None,) * dims]
    products = torch.stack([apart[0] ** 2, apart[1] ** 2, apart[0] * apart[1]])
    return total, mean, (products * weight).sum(axes)


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 13])
@pytest.mark.parametrize("sigma", [None, 1.7])
def test_any_odd_window_along_every_axis(size: int, sigma: float | None) -> None:
    images = torch.rand(2, 2, size + 3, size, dtype=torch.float64)
    kernel = Kernel(size, sigma)
    moments = window_moments(images, 1.0, kernel)
    weight, mean, spread = explicit(images, torch.ones_like(images[:1]), kernel)
    assert moments.weight == pytest.approx(weight.flatten()[0].item())
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.spread, spread)


@pytest.mark.parametrize("sigma", [None, 1.2])
def test_weighted_windows_3d(sigma: float | None) -> None:
    images = torch.rand(2, 1, 7, 6, 8, dtype=torch.float64)
    weight = torch.rand(1, 1, 7, 6, 8, dtype=torch.float64).round()
    kernel = Kernel(5, sigma)
    moments = window_moments(images, weight, kernel)
    total, mean, spread = explicit(images, weight, kernel)
    torch.testing.assert_close(moments.weight, total)
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.spread, spread)


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, -1e6])
def test_float32_spread_survives_an_offset(offset: float, device: torch.device) -> None:
    images = (torch.rand(2, 1, 14, 13, 12) + offset).to(device)
    _, _, spread = explicit(images, torch.ones_like(images[:1]), Kernel(9))
    moments = window_moments(images, 1.0, Kernel(9))
    # E[x^2] - E[x]^2 would be off by 1e-7 * offset^2 / variance: by 1 % at 100, by all at 1e4.
    assert ((moments.spread.double() - spread).abs().amax() / spread[0].amax()) < 1e-7 * max(20.0, abs(offset))
    assert (moments.spread[:2] >= 0).all()


def test_spread_of_a_constant_is_exactly_zero() -> None:
    images = torch.full((2, 1, 12, 12, 12), 1234.567)
    assert (window_moments(images, 1.0, Kernel(9)).spread == 0).all()


def test_merge_is_the_statistics_of_both() -> None:
    values = torch.rand(2, 1, 5, dtype=torch.float64)
    moments = window_moments(values, 1.0, Kernel(3))
    both = merge(
        moments.narrow(2, 0, 1), merge(*(window_moments(values[..., k : k + 1], 1.0, Kernel(1)) for k in (3, 4)))
    )
    assert both.weight == 5
    torch.testing.assert_close(both.mean[..., 0], values.mean(-1))
    torch.testing.assert_close(both.spread[0], values[0].var(-1, unbiased=False, keepdim=True) * 5)


@pytest.mark.parametrize("sigma", [None, 2.0])
@pytest.mark.parametrize("size", [3, 7, 9])
def test_window_sums(size: int, sigma: float | None) -> None:
    maps = torch.rand(3, 2, size + 4, size + 1, dtype=torch.float64)
    kernel = Kernel(size, sigma)
    taps = torch.tensor(kernel.taps, dtype=torch.float64)
    expected = (maps.unfold(2, size, 1).unfold(3, size, 1) * taps[:, None] * taps).sum((-1, -2))
    torch.testing.assert_close(window_sums(maps, kernel), expected)


def test_gaussian_taps_add_up_to_one_and_are_symmetric() -> None:
    taps = Kernel(9, 2.0).taps
    assert sum(taps) == pytest.approx(1.0, abs=1e-15)
    assert taps == taps[::-1]
    assert taps[4] / taps[6] == pytest.approx(2.718281828459045**0.5)
