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
"""Integrating and composing fields."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from monai.networks.blocks import DVF2DDF

from common.spatial import affine_to_ddf, compose, identity_grid, integrate, warp

SHAPES = [(18, 23), (13, 16, 11)]


def inner(field: torch.Tensor, margin: int = 4) -> torch.Tensor:
    """The field away from the border."""
    return field[(..., *(slice(margin, -margin),) * (field.dim() - 2))]


@pytest.fixture(params=[1, 2])
def thread_count(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_monai_with_gradients(shape, batch, smooth_field, thread_count):
    velocity = smooth_field(shape, 3.0).repeat(batch, *(1,) * (len(shape) + 1))
    velocity = (velocity + 0.3 * torch.randn_like(velocity)).requires_grad_()
    weight = torch.rand_like(velocity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = DVF2DDF(num_steps=7)(velocity)
    ours = integrate(velocity, 7, padding="zeros")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    (mine,) = torch.autograd.grad((ours * weight).sum(), velocity)
    (other,) = torch.autograd.grad((theirs * weight).sum(), velocity)
    # Positions on a voxel's kink may fall on either side of it: compare in the mean, and most one by one.
    assert (mine - other).abs().mean() < 1e-4
    assert ((mine - other).abs() < 1e-3).float().mean() > 0.999


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 5)])
def test_gradients_in_float64(shape, padding):
    velocity = (2 * torch.randn(2, len(shape), *shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: integrate(v, 3, padding=padding), (velocity,))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_negative_velocity_leads_home(shape, smooth_field, device):
    velocity = smooth_field(shape, 2.0).to(device)
    forth, back = integrate(velocity), integrate(-velocity)
    assert inner(forth).abs().max() > 1
    assert inner(compose(forth, back)).abs().max() < 0.1
    assert inner(compose(back, forth)).abs().max() < 0.1


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 10])
def test_constant_velocity_is_its_own_displacement(steps):
    velocity = torch.tensor([0.7, -1.2]).view(1, 2, 1, 1).expand(1, 2, 6, 5)
    torch.testing.assert_close(integrate(velocity, steps), velocity.contiguous())


def test_no_steps_and_one_step(smooth_field):
    velocity = smooth_field((8, 9), 1.0)
    torch.testing.assert_close(integrate(velocity, 0), velocity)
    torch.testing.assert_close(integrate(velocity, 1), compose(velocity / 2, velocity / 2))


def test_linear_velocity_integrates_to_the_matrix_exponential():
    """v(x) = A (x - c) flows to exp(A) (x - c); linear interpolation is exact for it, so only time is discrete."""
    shape, generator = (15, 15), torch.tensor([[0.05, -0.2], [0.15, -0.1]], dtype=torch.float64)
    centre = torch.tensor([[7.0], [7.0]], dtype=torch.float64)

    def about_centre(linear: torch.Tensor) -> torch.Tensor:
        matrix = torch.eye(3, dtype=torch.float64)
        matrix[:2, :2], matrix[:2, 2:] = linear, centre - linear @ centre
        return affine_to_ddf(matrix, shape)

    velocity = about_centre(torch.eye(2, dtype=torch.float64) + generator)
    expected = about_centre(torch.linalg.matrix_exp(generator))
    torch.testing.assert_close(inner(integrate(velocity, 12)), inner(expected), atol=1e-3, rtol=0)


def test_padding_decides_what_flows_in_from_outside():
    velocity = torch.full((1, 2, 8, 8), 2.0)
    torch.testing.assert_close(integrate(velocity), velocity)
    assert integrate(velocity, padding="zeros")[0, 0, -1, -1] < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_composition_equals_two_warps(shape, smooth_field, device):
    """On a ramp, which linear interpolation does not blur, the two are equal; and the other order is another map."""
    outer, second = (f.to(device) for f in (smooth_field(shape, 0.8), smooth_field(shape, 0.9).flip(2)))
    ramps = identity_grid(shape, device=device).unsqueeze(0)
    once = warp(ramps, compose(outer, second))
    torch.testing.assert_close(inner(once), inner(warp(warp(ramps, outer), second)), atol=1e-4, rtol=0)
    assert inner(once - warp(warp(ramps, second), outer)).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(40, 45), (24, 27, 25)])
def test_composition_of_a_smooth_image(shape, smooth_field, smooth_image):
    """Interpolating the image twice blurs it, by little where it is smooth."""
    outer, second, image = smooth_field(shape, 0.8), smooth_field(shape, 0.9).flip(2), smooth_image(shape)
    error = inner(warp(image, compose(outer, second)) - warp(warp(image, outer), second)).abs()
    assert error.mean() < 0.005 < inner(warp(image, second) - image).abs().mean()


def test_composition_is_exact_for_translations():
    """Whatever the order, +1 and then +2 voxels is +3."""
    one, two = (torch.full((1, 3, 4, 5, 6), value) for value in (1.0, 2.0))
    torch.testing.assert_close(compose(one, two), torch.full_like(one, 3.0))
    zero = torch.zeros_like(one)
    torch.testing.assert_close(compose(one, zero), one)
    torch.testing.assert_close(compose(zero, one), one)


def test_composition_takes_the_inner_grid_and_outer_value_at_its_end():
    """inner leads from 0 to 2, where outer says 10: together 12."""
    outer = torch.zeros(1, 2, 6, 3)
    outer[0, 0, 2] = 10
    second = torch.zeros(1, 2, 2, 3)
    second[0, 0, 0] = 2
    both = compose(outer, second)
    assert both.shape == second.shape
    torch.testing.assert_close(both[0, 0, 0], torch.full((3,), 12.0))
    torch.testing.assert_close(both[0, 0, 1], torch.zeros(3), atol=1e-4, rtol=0)


def test_composition_has_both_gradients():
    fields = [torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(compose, fields)


def test_fields_are_never_half_precision(device, smooth_field):
    velocity = smooth_field((12, 14), 2.0).to(device)
    for half in (torch.bfloat16, torch.float16):
        expected = integrate(velocity.to(half).float())
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert torch.equal(integrate(velocity.to(half)), expected)
            result = compose(velocity.to(half), velocity)
        assert result.dtype == torch.float32
        assert torch.equal(result, compose(velocity.to(half).float(), velocity))


def test_gradient_reaches_a_half_precision_velocity():
    velocity = torch.randn(1, 2, 6, 6, dtype=torch.bfloat16, requires_grad=True)
    integrate(velocity).sum().backward()
    assert velocity.grad is not None and velocity.grad.dtype == torch.bfloat16 and velocity.grad.abs().sum() > 0


def test_inputs_are_left_alone(smooth_field):
    velocity = smooth_field((9, 9), 1.0)
    before, parameter = velocity.clone(), velocity.clone().requires_grad_()
    integrate(velocity, 0).add_(1)
    integrate(velocity)
    integrate(parameter).square().sum().backward()
    assert torch.equal(velocity, before) and torch.equal(parameter.detach(), before)


def test_backward_twice_gives_the_same(smooth_field):
    velocity = smooth_field((9, 9), 1.0).requires_grad_()
    result = integrate(velocity)
    (first,) = torch.autograd.grad(result.sum(), velocity, retain_graph=True)
    (second,) = torch.autograd.grad(result.sum(), velocity)
    assert torch.equal(first, second)


def test_errors():
    with pytest.raises(ValueError, match="-1"):
        integrate(torch.zeros(1, 2, 4, 4), -1)
    with pytest.raises(ValueError, match=r"velocity.*\(1, 3, 4, 4\)"):
        integrate(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="'reflect'"):
        integrate(torch.zeros(1, 2, 4, 4), padding="reflect")
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\) and \(1, 2, 4, 4\)"):
        compose(torch.zeros(2, 2, 4, 4), torch.zeros(1, 2, 4, 4))


def test_parity_of_a_rough_velocity(shared):
    """Parity figures of a published integration with zeros outside."""
    assert shared
    random = np.random.RandomState(0)
    random.rand(2, 20, 24, 28)
    flow = torch.tensor((2 * random.standard_normal((1, 3, 20, 24, 28))).astype(np.float32))
    ddf = integrate(flow, 7, padding="zeros").double()
    assert ddf.sum().item() == pytest.approx(81.1791373, abs=2e-3)
    assert ddf.abs().mean().item() == pytest.approx(0.544311375, rel=1e-6)
    assert ddf.abs().max().item() == pytest.approx(2.85293484, rel=1e-5)
