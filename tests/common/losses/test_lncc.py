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
"""Local correlation: published values, exact cases, invariances, precision, masks, gradients."""

from __future__ import annotations

import json
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from common.losses import LNCC
from common.losses import lncc as module

FORMS = [
    {},
    {"form": "sum"},
    {"kernel": "gaussian", "sigma": 1.3},
    {"border": "inside"},
    {"floor": "clamp", "eps": 1e-3},
    {"kernel": "gaussian", "border": "inside"},
]
IDS = ["mean", "sum", "gaussian", "inside", "clamp", "gaussian-inside"]


def reference(moved: Tensor, fixed: Tensor, window: int = 9, eps: float = 1e-5, summed: bool = False) -> float:
    """The box form in float64, two-pass over explicitly cut windows of the zero-padded images."""
    cut = []
    for image in (moved, fixed):
        image = functional.pad(image.detach().double().cpu(), [window // 2] * 2 * (image.ndim - 2))
        for axis in range(2, image.ndim):
            image = image.unfold(axis, window, 1)
        image = image.flatten(moved.ndim)
        cut.append(image - image.mean(-1, keepdim=True))
    reduce = torch.sum if summed else torch.mean
    first, second = cut
    cross, product = reduce(first * second, -1), reduce(first * first, -1) * reduce(second * second, -1)
    return -(cross**2 / (product + eps)).mean().item()


@pytest.fixture
def pair3() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    smooth = functional.avg_pool3d(torch.rand(2, 1, 20, 18, 17, generator=generator), 5, 1)
    return smooth[:1], 0.7 * smooth[:1] + 0.3 * smooth[1:]


class TestPublishedValues:
    def test_pretraining(self) -> None:
        generator = torch.Generator().manual_seed(3)
        first, second = (torch.rand(1, 1, 64, 64, 64, generator=generator) for _ in range(2))
        gaussian, box = LNCC(9, "gaussian", sigma=2.0), LNCC(9, form="sum")
        assert gaussian(first, second).item() == pytest.approx(-0.049224, abs=1e-6)
        assert gaussian(first, first).item() == pytest.approx(-0.998686, abs=1e-6)
        assert box(first, second).item() == pytest.approx(-0.072860, abs=1e-6)
        assert box(first, first).item() == pytest.approx(-1.0, abs=1e-6)

    def test_spatially_varying_regularisation(self) -> None:
        random = np.random.RandomState(0)
        first, second = (torch.tensor(random.rand(1, 1, 20, 24, 28), dtype=torch.float32) for _ in range(2))
        assert LNCC(form="sum")(first, second).item() == pytest.approx(-0.178281859, rel=1e-6)
        assert LNCC(form="sum")(first, (first + second) / 2).item() == pytest.approx(-0.668001294, rel=1e-6)
        assert LNCC(form="mean")(first, second).item() == pytest.approx(-0.178103343, rel=1e-6)

    def test_dual_stream_pyramid(self, shared: Path) -> None:
        folder = shared / "parity" / "dual_stream_pyramid"
        arrays, figures = np.load(folder / "losses.npz"), json.loads((folder / "small_refs.json").read_text())
        fixed, warped = torch.tensor(arrays["fixed"]), torch.tensor(arrays["warped"]).requires_grad_()
        vfa = LNCC(9, eps=torch.finfo(torch.float32).eps, floor="clamp")(warped, fixed)
        assert 1 + vfa.item() == pytest.approx(figures["NCC_vfa(fixed,warped)"], rel=1e-5)
        assert 1 + LNCC(9, form="sum")(warped, fixed).item() == pytest.approx(figures["NCC_vxm_win9"], rel=1e-5)
        assert LNCC(11, form="sum")(warped, fixed).item() == pytest.approx(figures["SITReg_LNCC_win11"], rel=1e-5)
        (gradient,) = torch.autograd.grad(vfa, warped)
        torch.testing.assert_close(gradient, torch.tensor(arrays["ncc_grad"]), rtol=0, atol=1e-5 * gradient.abs().max())


class TestExactCases:
    @pytest.mark.parametrize("shape", [(9, 11), (8, 9, 10)])
    @pytest.mark.parametrize("kernel", ["box", "gaussian"])
    def test_ramps_correlate_fully_however_steep(self, shape: tuple[int, ...], kernel: str) -> None:
        ramp = torch.arange(float(np.prod(shape))).view(1, 1, *shape)
        loss = LNCC(3, kernel, eps=1e-12, border="inside")
        assert loss(ramp, ramp).item() == pytest.approx(-1.0, abs=1e-5)
        assert loss(ramp, 4000.0 - 0.02 * ramp).item() == pytest.approx(-1.0, abs=1e-4)

    def test_crossed_ramps_do_not_correlate(self) -> None:
        rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
        centre = torch.zeros(1, 1, 8, 8)
        centre[..., 2:6, 2:6] = 1
        # With the mask the windows on its border are cut, but stay rectangles, over which the ramps are uncorrelated.
        assert LNCC(3)(rows, rows.transpose(2, 3), centre).item() == pytest.approx(0.0, abs=1e-10)

    @pytest.mark.parametrize(("form", "place"), [("mean", 1.0), ("sum", 27.0**2)])
    def test_eps_enters_where_the_form_says(self, form: str, place: float) -> None:
        # Windows of 5 around every voxel of a 3^3 image hold all of it, so each correlation is known by hand.
        image = torch.rand(1, 1, 3, 3, 3, dtype=torch.float64)
        product = image.var(unbiased=False).item() ** 2
        loss = LNCC(5, form=form, eps=0.01, border="inside")
        assert loss(image, image).item() == pytest.approx(-product / (product + 0.01 / place), rel=1e-9)
        clamped = LNCC(5, form=form, eps=0.01, border="inside", floor="clamp")
        assert clamped(image, image).item() == pytest.approx(-min(1.0, product / (0.01 / place)), rel=1e-9)

    @pytest.mark.parametrize("window", [3, 5, 7, 9, 11, 13])
    @pytest.mark.parametrize("summed", [False, True])
    def test_any_odd_window(self, window: int, summed: bool, device: torch.device) -> None:
        moved, fixed = torch.rand(2, 2, 1, 10, 7, device=device)
        loss = LNCC(window, form="sum" if summed else "mean")
        assert loss(moved, fixed).item() == pytest.approx(reference(moved, fixed, window, summed=summed), rel=1e-5)

    def test_monai_where_it_is_right(self, pair3: tuple[Tensor, Tensor]) -> None:
        theirs = monai.losses.LocalNormalizedCrossCorrelationLoss(kernel_size=5, smooth_dr=1e-7)
        moved, fixed = (image.clone().requires_grad_() for image in pair3)
        ours = LNCC(5, form="sum", eps=1e-14)
        values = theirs(moved, fixed), ours(moved, fixed)
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-4)
        for expected, found in zip(*(torch.autograd.grad(v, (moved, fixed)) for v in values), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


class TestInvariance:
    @pytest.mark.parametrize("kernel", ["box", "gaussian"])
    @pytest.mark.parametrize(("scale", "offset"), [(3.0, 0.0), (-1.0, 0.0), (1.0, 100.0), (-2.5, -1000.0)])
    def test_affine_intensities(self, pair3: tuple[Tensor, Tensor], kernel: str, scale: float, offset: float) -> None:
        moved, fixed = pair3
        loss = LNCC(5, kernel, eps=1e-12, border="inside")
        assert loss(scale * moved + offset, fixed).item() == pytest.approx(loss(moved, fixed).item(), abs=2e-4)

    def test_affine_intensities_with_an_empty_rim(self, pair3: tuple[Tensor, Tensor]) -> None:
        moved, fixed = (functional.pad(image, [5] * 6) for image in pair3)
        loss = LNCC(9, eps=1e-12)
        assert loss(7.0 * moved, fixed).item() == pytest.approx(loss(moved, fixed).item(), rel=1e-5)

    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_symmetric_and_flips(self, pair3: tuple[Tensor, Tensor], options: dict) -> None:
        moved, fixed = pair3
        loss = LNCC(5, **options)
        value = loss(moved, fixed).item()
        assert loss(fixed, moved).item() == pytest.approx(value, rel=1e-5)
        assert loss(moved.flip(2, 4), fixed.flip(2, 4)).item() == pytest.approx(value, rel=1e-5)
        assert loss(moved.transpose(2, 4), fixed.transpose(2, 4)).item() == pytest.approx(value, rel=1e-5)

    def test_batch_and_channels_are_averaged(self) -> None:
        moved, fixed = torch.rand(2, 2, 3, 9, 8)
        parts = [LNCC(5)(moved[b : b + 1, c : c + 1], fixed[b : b + 1, c : c + 1]) for b in range(2) for c in range(3)]
        assert LNCC(5)(moved, fixed).item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)

    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_pieces_do_not_show(self, monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
        moved, fixed = torch.rand(2, 3, 1, 13, 5, 6).requires_grad_()
        mask = torch.rand(3, 1, 13, 5, 6).round()
        loss = LNCC(3, **options)
        whole = loss(moved, fixed, mask)
        (expected,) = torch.autograd.grad(whole, moved)
        monkeypatch.setattr(module, "_PIECE_CPU", 70)
        found = loss(moved, fixed, mask)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(torch.autograd.grad(found, moved)[0], expected, rtol=1e-4, atol=1e-8)


class TestPrecision:
    @pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
    @pytest.mark.parametrize("form", ["mean", "sum"])
    def test_offset_equals_float64(
        self, pair3: tuple[Tensor, Tensor], offset: float, form: str, device: torch.device
    ) -> None:
        moved, fixed = (image.to(device) + offset for image in pair3)
        moved.requires_grad_()
        loss = LNCC(5, form=form)
        value = loss(moved, fixed)
        assert value.item() == pytest.approx(reference(moved, fixed, 5, summed=form == "sum"), rel=1e-4)
        (gradient,) = torch.autograd.grad(value, moved)
        exact = moved.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(loss(exact, fixed.double()), exact)
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=2e-3 * expected.abs().max().item())

    def test_twelve_bit_scan_with_flat_air(self, pair3: tuple[Tensor, Tensor]) -> None:
        moved, fixed = ((image - 0.3) * 8000 for image in pair3)
        moved, fixed = (image.round().clamp(0, 4095).clone() for image in (moved, fixed))
        moved[..., :7], fixed[..., :7] = 0.0, 0.0
        assert LNCC(5)(moved, fixed).item() == pytest.approx(reference(moved, fixed, 5), rel=1e-5)
        assert LNCC(5)(moved - 1024, fixed - 1024).item() == pytest.approx(
            reference(moved - 1024, fixed - 1024, 5), rel=1e-5
        )

    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    @pytest.mark.parametrize("values", [(0.0, 0.0), (0.7, 0.3), (4095.0, 0.0), (-1000.0, 37.7)])
    @pytest.mark.parametrize("shape", [(40, 12), (14, 13, 12)])
    def test_constant_images(self, options: dict, values: tuple[float, float], shape: tuple[int, ...]) -> None:
        moved, fixed = (torch.full((1, 1, *shape), value).requires_grad_() for value in values)
        loss = LNCC(5, **options)(moved, fixed)
        assert -1.0 <= loss.item() <= 0.0
        if options.get("border") == "inside" or 0.0 in values:
            assert loss.item() == pytest.approx(0.0, abs=1e-12)
        for gradient in torch.autograd.grad(loss, (moved, fixed)):
            assert torch.isfinite(gradient).all()

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_range_on_noise(self, scale: float, options: dict) -> None:
        image = (scale * torch.randn(1, 1, 12, 11, 10)).requires_grad_()
        loss = LNCC(9, **options)(image, image.detach() + 0.0)
        assert -1.0 <= loss.item() <= 0.0
        assert torch.isfinite(torch.autograd.grad(loss, image)[0]).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, dtype: torch.dtype, device: torch.device) -> None:
        moved, fixed = (image.to(device, dtype) for image in torch.rand(2, 1, 1, 12, 11, 10))
        moved.requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = LNCC(5)(moved, fixed)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(reference(moved.float(), fixed.float(), 5), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, moved)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0

    def test_image_smaller_than_the_window(self) -> None:
        moved, fixed = torch.rand(2, 1, 1, 3, 4, 5)
        assert LNCC(9)(moved, fixed).item() == pytest.approx(reference(moved, fixed), rel=1e-5)

    def test_meta_data_is_left_behind(self) -> None:
        image = monai.data.MetaTensor(torch.rand(1, 1, 8, 8)).requires_grad_()
        loss = LNCC(3)(image, torch.rand(1, 1, 8, 8))
        assert type(loss) is Tensor
        loss.backward()
        assert image.grad is not None


class TestMask:
    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_of_ones_is_none(self, pair3: tuple[Tensor, Tensor], options: dict) -> None:
        loss = LNCC(5, **options)
        ones = torch.ones(pair3[0].shape, dtype=torch.bool)
        assert loss(*pair3, ones).item() == pytest.approx(loss(*pair3).item(), rel=1e-5)

    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_values_outside_do_not_matter(self, pair3: tuple[Tensor, Tensor], options: dict) -> None:
        moved, fixed = (image.clone() for image in pair3)
        mask = torch.zeros(moved.shape)
        mask[..., 3:11, 2:9, 4:12] = 1
        loss = LNCC(5, **options)
        value = loss(moved, fixed, mask).item()
        assert value < -1e-3
        moved[mask == 0], fixed[mask == 0] = float("nan"), 1e6
        moved.requires_grad_()
        again = loss(moved, fixed, mask)
        assert again.item() == pytest.approx(value, rel=1e-6)
        (gradient,) = torch.autograd.grad(again, moved)
        assert (gradient[mask == 0] == 0).all()
        assert (gradient[mask == 1] != 0).any()

    def test_is_a_cut_when_it_is_a_box(self, pair3: tuple[Tensor, Tensor]) -> None:
        mask = torch.zeros(pair3[0].shape)
        box = (..., slice(3, 11), slice(2, 9), slice(4, 12))
        mask[box] = 1
        inside = LNCC(5, border="inside")
        cut = [image[box] for image in pair3]
        assert inside(*pair3, mask).item() == pytest.approx(inside(*cut).item(), rel=1e-5)

    def test_empty(self) -> None:
        image = torch.rand(1, 1, 8, 8, requires_grad=True)
        loss = LNCC(3)(image, torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, image)[0] == 0).all()

    def test_broadcasts_over_batch_and_channels(self) -> None:
        moved, fixed = torch.rand(2, 2, 3, 9, 9)
        mask = torch.rand(1, 1, 9, 9).round()
        expected = LNCC(3)(moved, fixed, mask.expand(2, 3, 9, 9)).item()
        assert LNCC(3)(moved, fixed, mask).item() == pytest.approx(expected, rel=1e-6)


class TestGradient:
    @pytest.mark.parametrize("shape", [(2, 1, 5, 4), (1, 1, 3, 4, 3)], ids=["2-D", "3-D"])
    @pytest.mark.parametrize("options", FORMS, ids=IDS)
    def test_gradcheck(self, shape: tuple[int, ...], options: dict) -> None:
        moved, fixed = (torch.rand(shape, dtype=torch.float64).requires_grad_() for _ in range(2))
        assert torch.autograd.gradcheck(LNCC(3, **options), (moved, fixed))

    @pytest.mark.parametrize("options", FORMS[:4], ids=IDS[:4])
    def test_gradcheck_masked(self, options: dict) -> None:
        moved, fixed = (torch.rand((1, 2, 5, 4), dtype=torch.float64).requires_grad_() for _ in range(2))
        mask = torch.rand((1, 1, 5, 4), dtype=torch.float64).clamp_min(0.3).sub(0.3)
        loss = LNCC(3, **options)
        assert torch.autograd.gradcheck(lambda a, b: loss(a, b, mask), (moved, fixed))

    def test_only_where_it_is_asked_for(self) -> None:
        moved, fixed = torch.rand(2, 1, 1, 9, 9)
        assert not LNCC(3)(moved, fixed).requires_grad
        fixed.requires_grad_()
        both = LNCC(3)(moved.clone().requires_grad_(), fixed)
        (expected,) = torch.autograd.grad(both, fixed)
        (found,) = torch.autograd.grad(LNCC(3)(moved, fixed), fixed)
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            assert not LNCC(3)(moved, fixed).requires_grad

    def test_not_twice(self) -> None:
        image = torch.rand(1, 1, 9, 9, requires_grad=True)
        (gradient,) = torch.autograd.grad(LNCC(3)(image, torch.rand(1, 1, 9, 9)), image, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()

    def test_scales_with_what_arrives(self) -> None:
        image, other = torch.rand(1, 1, 9, 9, requires_grad=True), torch.rand(1, 1, 9, 9)
        (one,) = torch.autograd.grad(LNCC(3)(image, other), image)
        (three,) = torch.autograd.grad(3 * LNCC(3)(image, other), image)
        torch.testing.assert_close(three, 3 * one)

    def test_descent_makes_an_image_like_another(self) -> None:
        x = torch.linspace(0, 6, 40)
        fixed = torch.sin(x)[:, None] * torch.cos(1.3 * x)
        moved = (torch.rand(1, 1, 40, 40) * 0.1).requires_grad_()
        optimiser, loss = torch.optim.Adam([moved], lr=0.05), LNCC(7)
        before = loss(moved, fixed[None, None]).item()
        for _ in range(30):
            optimiser.zero_grad()
            loss(moved, fixed[None, None]).backward()
            optimiser.step()
        assert loss(moved, fixed[None, None]).item() < before - 0.5


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"window": 4}, "odd whole number"),
            ({"window": 1}, "at least 3"),
            ({"kernel": "triangle"}, r"kernel must be one of \['box', 'gaussian'\]"),
            ({"form": "max"}, "form must be one of"),
            ({"eps": 0.0}, "eps must be a positive number"),
            ({"kernel": "gaussian", "sigma": -1.0}, "sigma must be a positive number"),
            ({"sigma": 2.0}, "sigma 2.0 is for kernel 'gaussian'"),
            ({"kernel": "gaussian", "form": "sum"}, "form 'sum' is for kernel 'box'"),
            ({"spatial_dims": 4}, "spatial_dims"),
            ({"border": "reflect"}, "border must be one of"),
        ],
    )
    def test_options(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LNCC(**options)

    def test_shapes_are_both_named(self) -> None:
        with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\) but fixed has shape \(1, 1, 8, 9\)"):
            LNCC()(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))
        with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 8, 9\) but the images have shape \(1, 1, 8, 8\)"):
            LNCC()(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 9))
        with pytest.raises(ValueError, match="expected 3 spatial axes"):
            LNCC(spatial_dims=3)(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
        with pytest.raises(TypeError, match="moved must be a tensor, got ndarray"):
            LNCC()(np.zeros((1, 1, 8, 8)), torch.rand(1, 1, 8, 8))
