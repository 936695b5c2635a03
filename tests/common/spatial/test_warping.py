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
"""Warping of images and points."""

from __future__ import annotations

import math
import warnings

import monai
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from scipy.ndimage import map_coordinates

from common.spatial import identity_grid, integrate, warp, warp_points

SHAPES = [(9, 14), (7, 10, 5)]


def monai_warp(image: torch.Tensor, ddf: torch.Tensor, **options: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Warp(**options)(image, ddf)


@pytest.fixture(params=[1, 2, 3])
def thread_count(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8), (6, 1, 8), (1, 1, 4)])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_zero_field_is_the_identity(shape, mode, padding, device):
    image = torch.rand(2, 3, *shape, device=device)
    moved = warp(image, torch.zeros(2, len(shape), *shape, device=device), mode=mode, padding=padding)
    assert moved.device == image.device
    torch.testing.assert_close(moved, image, rtol=0, atol=2e-6 if mode == "linear" else 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_translation_pulls_content_to_lower_indices(shape, mode, axis, device):
    """+2 along an axis: the value of index 5 is seen at index 3; beyond the end, the border repeats or is zero."""
    axis %= len(shape)
    image = torch.rand(1, 1, *shape, device=device)
    ddf = torch.zeros(1, len(shape), *shape, device=device)
    ddf[:, axis] = 2.0
    size = shape[axis]
    for padding in ("border", "zeros"):
        moved = warp(image, ddf, mode=mode, padding=padding)
        kept = moved.narrow(2 + axis, 0, size - 2)
        torch.testing.assert_close(kept, image.narrow(2 + axis, 2, size - 2), rtol=0, atol=2e-6)
        rest = moved.narrow(2 + axis, size - 2, 2)
        last = image.narrow(2 + axis, size - 1, 1).expand_as(rest)
        torch.testing.assert_close(rest, last if padding == "border" else torch.zeros_like(rest), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_linear_equals_scipy(shape, padding):
    image, ddf = torch.rand(2, 2, *shape), 3 * torch.randn(2, len(shape), *shape)
    moved = warp(image, ddf, padding=padding)
    mode = "nearest" if padding == "border" else "grid-constant"
    for b in range(2):
        places = (identity_grid(shape) + ddf[b]).double().numpy()
        for c in range(2):
            expected = map_coordinates(image[b, c].double().numpy(), places, order=1, mode=mode, cval=0.0)
            np.testing.assert_allclose(moved[b, c].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_nearest_equals_scipy_and_keeps_integers(shape, padding):
    image = torch.randint(-(2**60), 2**60, (1, 1, *shape))  # float32 or float64 would lose these
    ddf = 3 * torch.rand(1, len(shape), *shape) - 1.5
    moved = warp(image, ddf, mode="nearest", padding=padding)
    assert moved.dtype == torch.int64
    places = np.rint((identity_grid(shape) + ddf[0]).numpy()).astype(int)
    inside = np.all([(p >= 0) & (p < n) for p, n in zip(places, shape, strict=True)], axis=0)
    held = tuple(np.clip(p, 0, n - 1) for p, n in zip(places, shape, strict=True))
    expected = image[0, 0].numpy()[held]
    np.testing.assert_array_equal(moved[0, 0].numpy(), np.where(inside | (padding == "border"), expected, 0))


@pytest.mark.parametrize("shape", [*SHAPES, (16, 18, 12)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_equals_monai_with_gradients(shape, batch, padding, thread_count):
    image = torch.rand(batch, 2, *shape, requires_grad=True)
    ddf = (2 * torch.randn(batch, len(shape), *shape)).requires_grad_()
    weight = torch.rand(batch, 2, *shape)
    ours, theirs = warp(image, ddf, padding=padding), monai_warp(image, ddf, padding_mode=padding)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (image, ddf)),
        torch.autograd.grad((theirs * weight).sum(), (image, ddf)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=3e-5)


@pytest.mark.parametrize("of_image", [True, False])
def test_one_gradient_alone_is_that_of_both(of_image, thread_count):
    image, ddf = torch.rand(1, 1, 12, 8, 8), torch.randn(1, 3, 12, 8, 8)
    both = (image.clone().requires_grad_(), ddf.clone().requires_grad_())
    warp(*both).square().sum().backward()
    one = (image.clone().requires_grad_(of_image), ddf.clone().requires_grad_(not of_image))
    warp(*one).square().sum().backward()
    for single, pair in zip(one, both, strict=True):
        assert (single.grad is None) == (not single.requires_grad)
        if single.requires_grad:
            torch.testing.assert_close(single.grad, pair.grad)


@pytest.mark.parametrize(("moving", "fixed"), [((5, 6), (4, 7)), ((3, 4, 5), (4, 2, 3)), ((4, 1, 5), (3, 2, 4))])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_gradients_in_float64(moving, fixed, padding):
    """The dtype of the inputs decides; float64 is there for this check. Grids of two sizes."""
    image = torch.rand(2, 2, *moving, dtype=torch.float64, requires_grad=True)
    ddf = (1.3 * torch.randn(2, len(fixed), *fixed, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, u: warp(i, u, padding=padding), (image, ddf))


def test_grids_of_two_sizes_share_their_first_voxel():
    image = torch.arange(35.0).view(1, 1, 5, 7)
    moved = warp(image, torch.zeros(1, 2, 3, 9))
    torch.testing.assert_close(moved[0, 0, :, :7], image[0, 0, :3], atol=2e-5, rtol=0)
    torch.testing.assert_close(moved[0, 0, :, 7:], image[0, 0, :3, 6:].expand(3, 2), atol=2e-5, rtol=0)


def test_leaving_an_axis_of_one_voxel():
    """Zeros: half a voxel off a single slice is half of it, a whole one is nothing. Border: the slice goes on."""
    image = torch.full((1, 1, 1, 3, 3), 8.0)
    ddf = torch.zeros(1, 3, 1, 3, 3)
    for shift, expected in ((0.5, 4.0), (-0.25, 6.0), (1.0, 0.0), (5.0, 0.0)):
        ddf[:, 0] = shift
        torch.testing.assert_close(warp(image, ddf, padding="zeros"), torch.full_like(image, expected))
        torch.testing.assert_close(warp(image, ddf), image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_move_by_exact_amounts(dtype, device):
    """At voxel 200 bfloat16 positions are whole: a shift of 0.3 would be lost. It is not, as fields are float32."""
    image = (torch.arange(240, device=device) % 2).to(dtype).view(1, 1, 240, 1).expand(1, 1, 240, 4).contiguous()
    ddf = torch.zeros(1, 2, 240, 4, device=device)
    ddf[:, 0] = 0.3
    moved = warp(image, ddf)
    assert moved.dtype == dtype
    expected = torch.where(image[:, :, :-1] > 0, 0.7, 0.3).float()
    torch.testing.assert_close(moved[:, :, :-1].float(), expected, atol=4e-3, rtol=0)


def test_autocast_does_not_lower_the_field(device):
    image, ddf = torch.rand(1, 1, 60, 64, device=device), torch.randn(1, 2, 60, 64, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        moved = warp(image, ddf)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, warp(image, ddf), rtol=0, atol=0)
    assert warp(image, ddf.bfloat16()).dtype == torch.float32


def test_integer_images_become_float_when_interpolated():
    moved = warp(torch.tensor([[[[0, 10]]]], dtype=torch.uint8), torch.full((1, 2, 1, 2), 0.25))
    torch.testing.assert_close(moved, torch.tensor([[[[2.5, 10.0]]]]))


def test_no_state_is_kept_between_sizes():
    for size in (8, 12, 8, 5):
        image = torch.rand(1, 1, size, size)
        torch.testing.assert_close(warp(image, torch.zeros(1, 2, size, size)), image, atol=2e-6, rtol=0)


def test_a_metatensor_becomes_plain():
    """The moved image is on the fixed grid: the moving image's affine would be wrong."""
    image = MetaTensor(torch.rand(1, 1, 4, 4), affine=torch.eye(4))
    assert type(warp(image, torch.zeros(1, 2, 4, 4))) is torch.Tensor
    assert monai.__version__


def test_can_be_traced():
    image, ddf = torch.rand(1, 1, 6, 5, 4), torch.randn(1, 3, 6, 5, 4)
    with torch.no_grad():
        traced = torch.jit.trace(lambda i, u: warp(i, u), (image, ddf))
        torch.testing.assert_close(traced(image.flip(2), -ddf), warp(image.flip(2), -ddf))


@pytest.mark.parametrize(
    ("image", "ddf"),
    [((1, 1, 4, 4), (1, 3, 4, 4)), ((2, 1, 4, 4), (1, 2, 4, 4)), ((1, 1, 4, 4), (1, 3, 4, 4, 4)), ((4, 4), (2, 4, 4))],
)
def test_errors_name_the_shapes(image, ddf):
    with pytest.raises(ValueError) as caught:
        warp(torch.zeros(image), torch.zeros(ddf))
    assert str(tuple(ddf)) in str(caught.value)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_unknown_options(mode):
    image, ddf = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="'reflect'"):
        warp(image, ddf, mode=mode, padding="reflect")
    with pytest.raises(ValueError, match="'cubic'"):
        warp(image, ddf, mode="cubic")


@pytest.mark.parametrize("shape", SHAPES)
def test_points_follow_the_field(shape, smooth_field, device):
    """At voxels the field's own value is added; a blob drawn at the landing place moves to the point."""
    ddf = smooth_field(shape, 1.5).to(device)
    voxels = torch.tensor([[1] * len(shape), [3] * len(shape)], device=device)
    landed = warp_points(voxels[None], ddf)
    expected = voxels + torch.stack([ddf[0][(slice(None), *v.tolist())] for v in voxels])
    torch.testing.assert_close(landed, expected[None], rtol=0, atol=1e-5)


def test_points_and_images_move_the_same_way():
    """A translation of +2: what the fixed grid shows at 3 lies at 5 in moving; and the point 3 lands at 5."""
    moving = torch.zeros(1, 1, 9, 9)
    moving[0, 0, 5, 4] = 1
    ddf = torch.zeros(1, 2, 9, 9)
    ddf[:, 0] = 2
    place = (warp(moving, ddf)[0, 0] > 0.5).nonzero()
    assert place.tolist() == [[3, 4]]
    torch.testing.assert_close(warp_points(place[None].float(), ddf), torch.tensor([[[5.0, 4.0]]]))


def test_points_between_and_beyond_voxels():
    ddf = torch.zeros(1, 2, 3, 4)
    ddf[0, 0] = torch.tensor([0.0, 1.0, 4.0])[:, None]
    points = torch.tensor([[[0.5, 1.5], [1.25, 0.0], [7.0, -3.0]]])
    expected = torch.tensor([[[1.0, 1.5], [3.0, 0.0], [11.0, -3.0]]])
    torch.testing.assert_close(warp_points(points, ddf), expected)
    assert warp_points(points[:, :0], ddf).shape == (1, 0, 2)


def test_point_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(1, 5, 3\) and \(1, 2, 4, 4\)"):
        warp_points(torch.zeros(1, 5, 3), torch.zeros(1, 2, 4, 4))


def test_parity_of_a_rough_field(shared):
    """Parity figure of a published warp with zeros outside (float64 sum of the moved image)."""
    assert shared
    random = np.random.RandomState(0)
    image = torch.tensor(random.rand(1, 1, 20, 24, 28).astype(np.float32))
    random.rand(1, 1, 20, 24, 28)
    flow = torch.tensor((2 * random.standard_normal((1, 3, 20, 24, 28))).astype(np.float32))
    assert warp(image, flow, padding="zeros").double().sum().item() == pytest.approx(5403.07849, rel=1e-6)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("shape", [(12, 13), (8, 9, 10)])
def test_a_field_that_is_no_number_spoils_its_own_voxels_only(shape, padding, device):
    """PyTorch's sampler follows such a number out of the image, up to a crash."""
    image = torch.rand(2, 1, *shape, device=device, requires_grad=True)
    ddf = torch.rand(2, len(shape), *shape, device=device)
    clean = warp(image.detach(), ddf, padding=padding)
    ddf[1, 0, 3, 4] = math.nan
    moved = warp(image, ddf.requires_grad_(), padding=padding)
    spoilt = torch.zeros_like(clean, dtype=torch.bool)
    spoilt[1, 0, 3, 4] = True
    if device.type == "cpu":
        assert torch.equal(moved.isnan(), spoilt)
    torch.testing.assert_close(moved[~spoilt], clean[~spoilt])
    moved[~spoilt].sum().backward()
    assert image.grad[0].isfinite().all() and ddf.grad[0].isfinite().all()


@pytest.mark.parametrize("shape", [(12, 13), (8, 9, 10)])
def test_a_field_that_is_nowhere_a_number_is_no_crash(shape, device):
    everywhere = torch.full((2, len(shape), *shape), math.nan, device=device, requires_grad=True)
    warp(torch.rand(2, 1, *shape, device=device), everywhere).sum().backward()
    integrate(everywhere, 3).sum().backward()


@pytest.mark.parametrize("shape", [(12, 13), (8, 9, 10)])
def test_an_endless_field_leaves_the_image(shape):
    ddf = torch.full((1, len(shape), *shape), math.inf)
    image = torch.rand(1, 1, *shape)
    assert torch.equal(warp(image, ddf, padding="zeros"), torch.zeros_like(image))
    assert torch.equal(warp(image, ddf), image[(..., *[slice(-1, None)] * len(shape))].expand_as(image))
