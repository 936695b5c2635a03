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
"""Sobolev smoothing against grouped convolutions of a padded field, and its two gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing, sobolev_kernel

SIZES = [(9, 12), (8, 7, 11)]


def convolved(field: Tensor, half_width: int, strength: float) -> Tensor:
    """Padded once on all sides, then a depth-wise convolution along each axis."""
    dims = field.ndim - 2
    taps = torch.tensor(sobolev_kernel(half_width, strength), dtype=field.dtype)
    field = F.pad(field, (half_width,) * (2 * dims), mode="replicate")
    convolve = F.conv3d if dims == 3 else F.conv2d
    for axis in range(dims):
        weight = taps.view([-1 if k == axis else 1 for k in range(dims)]).expand(dims, 1, *(-1,) * dims)
        field = convolve(field, weight, groups=dims)
    return field


def test_the_kernel_is_the_one_known() -> None:
    expected = [0.01041667, 0.04166667, 0.15625, 0.58333333, 0.15625, 0.04166667, 0.01041667]
    assert sobolev_kernel(3, 0.5) == pytest.approx(expected, abs=1e-8)
    assert sobolev_kernel(0, 0.5) == (1.0,)
    assert sobolev_kernel(2, 0.0) == (0, 0, 1, 0, 0)
    # (I - L) for L = [[-2, 1, 0], [1, -2, 1], [0, 1, -2]]: the middle row of the inverse is (3, 9, 3) / 21.
    assert sobolev_kernel(1, 1.0) == pytest.approx([0.2, 0.6, 0.2])


@pytest.mark.parametrize(("half_width", "strength"), [(3, 0.5), (1, 2.0), (5, 0.9)])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_a_convolution_with_a_repeated_border(
    size: tuple[int, ...], half_width: int, strength: float, device: torch.device
) -> None:
    field = torch.randn(2, len(size), *size)
    found = SobolevSmoothing(half_width, strength)(field.to(device)).cpu()
    torch.testing.assert_close(found, convolved(field, half_width, strength), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(2, 5), (1, 3, 4)])
def test_axes_shorter_than_the_kernel(size: tuple[int, ...]) -> None:
    field = torch.randn(1, len(size), *size, dtype=torch.float64)
    torch.testing.assert_close(SobolevSmoothing()(field), convolved(field, 3, 0.5))


def test_constants_stay_and_width_0_is_no_smoothing() -> None:
    constant = torch.full((1, 3, 5, 6, 7), 2.5)
    torch.testing.assert_close(SobolevSmoothing()(constant), constant)
    field = torch.randn(1, 2, 5, 6)
    assert torch.equal(SobolevSmoothing(half_width=0)(field), field)


def test_the_published_gradient_is_that_of_the_identity() -> None:
    field = torch.randn(1, 2, 6, 7).requires_grad_()
    arriving = torch.randn_like(field)
    smooth = SobolevSmoothing()(field)
    (gradient,) = torch.autograd.grad(smooth, field, arriving)
    assert torch.equal(gradient, arriving) and not torch.allclose(smooth, field)


@pytest.mark.parametrize("size", [(5, 4), (2, 3, 9)])
def test_the_exact_gradient_is_exact(size: tuple[int, ...]) -> None:
    field = torch.randn(1, len(size), *size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(SobolevSmoothing(gradient="exact"), (field,))


def test_half_precision_is_raised() -> None:
    field = torch.randn(1, 2, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SobolevSmoothing()(field), SobolevSmoothing()(field))
        assert SobolevSmoothing()(field.bfloat16()).dtype == torch.float32


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        sobolev_kernel(-1)
    with pytest.raises(ValueError, match="gradient must be one of"):
        SobolevSmoothing(gradient="none")
    with pytest.raises(ValueError, match="velocity must be"):
        SobolevSmoothing()(torch.zeros(1, 1, 4, 4))


def test_published_smoothing(shared: Path) -> None:
    known = np.load(shared / "parity/similarity_learning/sobolev_reg_entropy.npz")
    assert sobolev_kernel() == pytest.approx(known["kernel"].tolist(), rel=1e-6)
    found = SobolevSmoothing()(torch.from_numpy(known["v"]).flip(1))
    torch.testing.assert_close(found, torch.from_numpy(known["v_smoothed"]).flip(1), atol=1e-6, rtol=1e-5)
