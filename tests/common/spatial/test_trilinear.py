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
"""The CPU's trilinear sampler against PyTorch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from common.spatial import identity_grid, integrate, trilinear, warp

PADDINGS = ["border", "zeros"]
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-12}


def reference(image: Tensor, ddf: Tensor, padding: str) -> Tensor:
    """grid_sample, with corners aligned: no axis may have one voxel."""
    places = identity_grid(ddf.shape[2:], dtype=ddf.dtype) + ddf
    scale = torch.tensor([2 / (count - 1) for count in image.shape[2:]], dtype=ddf.dtype)
    grid = (places.movedim(1, -1) * scale - 1).flip(-1)
    return grid_sample(image, grid, padding_mode=padding, align_corners=True)


def field_to(places: Tensor) -> Tensor:
    """The field (1, 3, N, 1, 1) that leads to the given places (N, 3)."""
    own = identity_grid((len(places), 1, 1), dtype=places.dtype)
    return (places.T.reshape(3, -1, 1, 1) - own).unsqueeze(0)


@pytest.fixture(params=[1, 2, 3])
def thread_count(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (2, 3)])
@pytest.mark.parametrize(("moving", "fixed"), [((7, 10, 5), (7, 10, 5)), ((2, 3, 9), (5, 4, 7))])
@pytest.mark.parametrize("block", [1, 40, 10**6])
def test_equals_grid_sample_with_gradients(
    batch, channels, moving, fixed, dtype, padding, block, thread_count, monkeypatch
):
    """Far enough to leave by every face; blocks of a row, of some rows, and one for all."""
    monkeypatch.setattr(trilinear, "_BLOCK", block)
    monkeypatch.setattr(trilinear, "_SHARED_BLOCK", block)
    image = torch.rand(batch, channels, *moving, dtype=dtype, requires_grad=True)
    ddf = (3 * torch.randn(batch, 3, *fixed, dtype=dtype)).requires_grad_()
    weight = torch.rand(batch, channels, *fixed, dtype=dtype)
    assert trilinear.fits(image, ddf)
    ours, theirs = warp(image, ddf, padding=padding), reference(image, ddf, padding)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype])
    for mine, other in zip(
        torch.autograd.grad(ours, (image, ddf), weight), torch.autograd.grad(theirs, (image, ddf), weight), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("padding", PADDINGS)
def test_on_and_beyond_every_face_edge_and_corner(padding):
    """Values wherever a coordinate may lie; slopes a little off the voxels, where there is but one."""
    size = (4, 3, 5)
    steps = torch.tensor([-1e6, -2.0, -1.0, -0.75, 0.0, 0.25, 1.0])
    axes = [torch.cat([steps, count - 1 - steps]) for count in size]
    places = torch.tensor(list(itertools.product(*(axis.tolist() for axis in axes))), dtype=torch.float64)
    image = torch.rand(1, 2, *size, dtype=torch.float64)
    for shift in (0.0, 0.01, -0.01):
        ddf = field_to(places + shift).requires_grad_()
        ours, theirs = warp(image, ddf, padding=padding), reference(image, ddf, padding)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
        if shift:
            slopes = [torch.autograd.grad(moved.square().sum(), ddf)[0] for moved in (ours, theirs)]
            torch.testing.assert_close(*slopes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_asked_does_no_harm(padding, bad):
    """Bad voxels next to the faces; positions on the last face, and beyond either, weigh them with 0."""
    image = torch.ones(1, 1, 4, 4, 4)
    image[..., 1] = image[..., 2] = bad
    for place in (3.0, -9.0, 12.0):
        moved = warp(image, field_to(torch.tensor([[1.0, 2.0, place]])), padding=padding)
        assert moved.item() == (1.0 if padding == "border" or place == 3.0 else 0.0)


def test_a_position_that_is_no_number_stays_its_own():
    ddf = torch.zeros(1, 3, 4, 4, 4)
    ddf[0, 1, 2, 2, 2] = math.nan
    moved = warp(torch.ones(1, 1, 4, 4, 4), ddf)
    assert moved[0, 0, 2, 2, 2].isnan() and moved.isnan().sum() == 1
    endless = torch.full((1, 3, 4, 4, 4), math.inf)
    assert (warp(torch.ones(1, 1, 4, 4, 4), endless, padding="zeros") == 0).all()


def test_the_last_voxel_of_a_large_grid():
    """Indices and positions hold at the far end of 100 voxels: a ramp is moved by what the field says."""
    size = (100, 3, 100)
    image = identity_grid(size).sum(0)[None, None]
    moved = warp(image, torch.full((1, 3, *size), 0.25))
    torch.testing.assert_close(moved[..., :-1, :-1, :-1], image[..., :-1, :-1, :-1] + 0.75, rtol=0, atol=5e-5)


def test_threads_and_blocks_change_nothing_but_rounding(thread_count, monkeypatch):
    monkeypatch.setattr(trilinear, "_BLOCK", 64)
    monkeypatch.setattr(trilinear, "_SHARED_BLOCK", 64)
    velocity = torch.randn(2, 3, 9, 8, 7)
    before = torch.get_num_threads()
    results = []
    for count in (1, before):
        torch.set_num_threads(count)
        one = velocity.clone().requires_grad_()
        moved = integrate(one, 3)
        results.append((moved, *torch.autograd.grad(moved.square().sum(), one)))
    for alone, shared_out in zip(*results, strict=True):
        torch.testing.assert_close(alone, shared_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_gradient_mode(mode, thread_count, monkeypatch):
    monkeypatch.setattr(trilinear, "_BLOCK", 16)
    monkeypatch.setattr(trilinear, "_SHARED_BLOCK", 16)
    image, ddf = torch.rand(1, 2, 6, 5, 4), torch.randn(1, 3, 6, 5, 4)
    with mode():
        moved, composed = warp(image, ddf), integrate(ddf, 2)
    torch.testing.assert_close(moved, reference(image, ddf, "border"), rtol=0, atol=3e-5)
    assert composed.isfinite().all() and not moved.requires_grad


def test_tensors_of_any_layout():
    image = torch.rand(2, 4, 5, 6, 3).movedim(-1, 1)
    ddf = torch.randn(2, 4, 5, 6, 3).movedim(-1, 1).requires_grad_()
    moved = warp(image, ddf)
    torch.testing.assert_close(moved, warp(image.contiguous(), ddf.contiguous()), rtol=0, atol=0)
    (summed,) = torch.autograd.grad(moved.sum(), ddf)  # arrives as one number, expanded
    (weighted,) = torch.autograd.grad(warp(image, ddf), ddf, torch.ones_like(moved))
    assert torch.equal(summed, weighted)


def test_the_inputs_are_left_alone(thread_count):
    image, ddf, weight = torch.rand(1, 2, 5, 4, 6), torch.randn(1, 3, 5, 4, 6), torch.rand(1, 2, 5, 4, 6)
    before = [tensor.clone() for tensor in (image, ddf, weight)]
    torch.autograd.grad(warp(image.requires_grad_(), ddf.requires_grad_()), (image, ddf), weight)
    assert all(torch.equal(now, then) for now, then in zip((image, ddf, weight), before, strict=True))


def test_where_it_does_not_serve(device):
    volume, field = torch.rand(1, 1, 3, 3, 3, device=device), torch.zeros(1, 3, 3, 3, 3, device=device)
    assert trilinear.fits(volume, field) == (device.type == "cpu")
    assert not trilinear.fits(volume[:, :, 0], field[:, :2, 0])
    assert not trilinear.fits(volume.to("meta"), field.to("meta"))
    assert not trilinear.fits(volume[:0], field[:0])
    assert not trilinear.fits(torch.empty(1).expand(1, 1, 2000, 2000, 2000).to(device), field)
