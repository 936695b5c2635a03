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
"""The interpolant and its slopes against an interpolation that is written out and differentiated by PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bundles.gradirn.scripts.interpolant import value_and_slopes
from common.spatial import warp

SIZES = [(9, 6), (5, 7, 4)]


def interpolate(image: Tensor, ddf: Tensor) -> Tensor:
    """image(x + ddf(x)) with plain indexing; only the weights depend on the field."""
    size = image.shape[2:]
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"))
    position = grid + ddf
    low = position.detach().floor()
    part = position - low
    total = torch.zeros_like(image)
    items = torch.arange(len(image)).view(-1, *(1,) * len(size))
    for corner in itertools.product((0, 1), repeat=len(size)):
        index = [(low[:, k] + side).clamp(0, size[k] - 1).long() for k, side in enumerate(corner)]
        weight = torch.ones_like(part[:, 0])
        for k, side in enumerate(corner):
            weight = weight * (part[:, k] if side else 1 - part[:, k])
        values = image.movedim(1, -1)[(items, *index)].movedim(-1, 1)
        total = total + values * weight.unsqueeze(1)
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_slopes_are_what_autograd_finds(
    size: tuple[int, ...], spread: float, dtype: torch.dtype, tolerance: float
) -> None:
    image = torch.rand(2, 2, *size, dtype=dtype)
    ddf = (spread * torch.randn(2, len(size), *size, dtype=dtype)).requires_grad_()
    value, slopes = value_and_slopes(image, ddf.detach())
    expected = interpolate(image, ddf)
    torch.testing.assert_close(value, expected.detach(), atol=tolerance, rtol=0)
    torch.testing.assert_close(value, warp(image, ddf.detach()), atol=4 * tolerance, rtol=0)
    for channel in range(2):
        (gradient,) = torch.autograd.grad(expected[:, channel].sum(), ddf, retain_graph=True)
        torch.testing.assert_close(slopes[:, channel], gradient, atol=tolerance, rtol=0)


def test_at_whole_voxels_the_slope_is_the_forward_difference(device: torch.device) -> None:
    image = torch.tensor([[1.0, 4.0, 9.0], [2.0, 2.0, 7.0]], device=device)[None, None]
    value, slopes = value_and_slopes(image, torch.zeros(1, 2, 2, 3, device=device))
    assert torch.equal(value, image)
    assert slopes[0, 0, 0].tolist() == [[1.0, -2.0, -2.0], [0.0, 0.0, 0.0]]
    assert slopes[0, 0, 1].tolist() == [[3.0, 5.0, 0.0], [0.0, 5.0, 0.0]]


@pytest.mark.parametrize("size", [(4, 3), (3, 2, 4)])
def test_both_results_can_be_differentiated_in_both_arguments(size: tuple[int, ...]) -> None:
    image = torch.rand(2, 2, *size, dtype=torch.float64, requires_grad=True)
    ddf = torch.randn(2, len(size), *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value_and_slopes, (image, ddf))


def test_axes_of_one_voxel_and_positions_that_are_no_numbers() -> None:
    image = torch.rand(1, 1, 1, 5)
    value, slopes = value_and_slopes(image, torch.full((1, 2, 1, 5), 0.25))
    assert torch.equal(slopes[:, :, 0], torch.zeros(1, 1, 1, 5))
    torch.testing.assert_close(value[..., :4], 0.75 * image[..., :4] + 0.25 * image[..., 1:])
    ddf = torch.zeros(1, 2, 1, 5)
    ddf[0, 1, 0, :3] = torch.tensor([float("nan"), float("inf"), 1e30])
    value, _ = value_and_slopes(image, ddf)
    assert value[0, 0, 0, 0].isnan() and torch.equal(value[0, 0, 0, 3:], image[0, 0, 0, 3:])
