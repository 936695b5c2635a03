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
"""Few compositions against all the squarings that they stand for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts import integration
from bundles.similarity_learning.scripts.integration import integrate_quickly
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from common.spatial import integrate

SIZES = [(24, 21), (13, 12, 14)]


def rough(size: tuple[int, ...], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """A smoothed white velocity, as samples of q(v) are."""
    white = SobolevSmoothing()(torch.randn(2, len(size), *size, dtype=dtype))
    return white / white.std() * std


@pytest.mark.parametrize("steps", [8, 10, 12])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_as_exact_as_float32_rounds(size: tuple[int, ...], steps: int, device: torch.device) -> None:
    velocity = rough(size, 0.3)
    assert velocity.abs().max() > 1
    expected = integrate(velocity, steps)
    difference = (integrate_quickly(velocity, steps) - expected).abs()
    assert difference.max() < 1e-5 and difference.mean() < 1e-7
    assert (integrate_quickly(velocity.float().to(device), steps).cpu() - expected).abs().max() < 2e-5
    # One squaring less is not what is reproduced: that would be seen.
    assert (integrate(velocity, steps - 1) - expected).abs().max() > 5e-5


def test_a_squaring_more_divides_the_difference_by_8() -> None:
    velocity = rough((20, 18), 1.0)
    expected = integrate(velocity, 12)
    mean = [(integrate_quickly(velocity, 12, squarings=kept) - expected).abs().mean() for kept in (3, 4, 5, 6)]
    ratios = torch.tensor([more / less for more, less in pairwise(mean)])
    assert ratios.min() > 5


def test_large_displacements_are_integrated_well() -> None:
    velocity = rough((30, 30), 1.0)
    for _ in range(20):
        velocity = SobolevSmoothing()(velocity)
    velocity = 20 * velocity / velocity.abs().max()
    assert (integrate_quickly(velocity, 12) - integrate(velocity, 12)).abs().max() < 2e-4


@pytest.mark.parametrize("squarings", [0, 3])
def test_gradients_are_those_of_finite_differences(squarings: int) -> None:
    velocity = rough((5, 4), 0.8)[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: integrate_quickly(v, squarings + 4, squarings=squarings), (velocity,))


@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_the_squarings(size: tuple[int, ...]) -> None:
    velocity = rough(size, 0.3).requires_grad_()
    arriving = torch.randn_like(velocity)
    (expected,) = torch.autograd.grad(integrate(velocity, 12), velocity, arriving)
    (found,) = torch.autograd.grad(integrate_quickly(velocity, 12), velocity, arriving)
    assert (found - expected).abs().mean() < 2e-5 * expected.abs().mean()


@pytest.mark.parametrize("steps", [0, 5, 7])
def test_few_squarings_are_done_as_they_are(steps: int) -> None:
    velocity = rough((9, 8), 1.0)
    assert torch.equal(integrate_quickly(velocity, steps), integrate(velocity, steps))


def test_two_compositions_stand_for_one_exactly() -> None:
    # b = a = 1, alpha = 1, beta = 0: h + h(x + h).
    assert integration._coefficients(1) == pytest.approx((1.0, 1.0, 1.0, 0.0))


def test_it_keeps_half_as_many_fields() -> None:
    velocity = rough((9, 8), 1.0, torch.float32).requires_grad_()
    kept = {}
    for function in (integrate, integrate_quickly):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            function(velocity * 1, 12)
        kept[function] = sum(sizes) / velocity.numel()
    assert kept[integrate] >= 12 and kept[integrate_quickly] <= 7  # of which one is the velocity itself


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="squarings must not be negative, got -1"):
        integrate_quickly(torch.zeros(1, 2, 4, 4), 12, squarings=-1)
    with pytest.raises(ValueError, match="steps must not be negative"):
        integrate_quickly(torch.zeros(1, 2, 4, 4), -1)
    with pytest.raises(ValueError, match="velocity must be"):
        integrate_quickly(torch.zeros(1, 3, 4, 4), 12)
