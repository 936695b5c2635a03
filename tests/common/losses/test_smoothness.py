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
"""Smoothness terms: published values, exact fields, spacing, gradients."""

from __future__ import annotations

from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from torch import Tensor

from common.losses import BendingEnergy, Diffusion
from common.losses import stencils as module
from common.spatial import identity_grid


def field(*components: Tensor) -> Tensor:
    """A batch of one field from its components (*S)."""
    return torch.stack(components).unsqueeze(0)


class TestDiffusion:
    def test_published_spatially_varying_regularisation(self) -> None:
        random = np.random.RandomState(0)
        random.rand(2, 1, 1, 20, 24, 28)
        ddf = torch.tensor(2 * random.standard_normal((1, 3, 20, 24, 28)), dtype=torch.float32)
        weight = torch.tensor(random.rand(1, 1, 20, 24, 28), dtype=torch.float32)
        assert Diffusion()(ddf).item() == pytest.approx(7.98654413, rel=1e-6)
        assert Diffusion(weight_at="upper")(ddf, weight).item() == pytest.approx(3.99816537, rel=1e-6)
        assert Diffusion("l1", weight_at="upper")(ddf, weight).item() == pytest.approx(1.1286813, rel=1e-6)

    def test_published_dual_stream_pyramid(self, shared: Path) -> None:
        ddf = torch.tensor(np.load(shared / "parity" / "dual_stream_pyramid" / "losses.npz")["field"])
        assert Diffusion()(ddf).item() == pytest.approx(2.000725030899048, rel=1e-6)

    def test_published_gradirn(self) -> None:
        assert Diffusion(reduction="frobenius")(torch.arange(32.0).view(1, 2, 4, 4)).item() == 25.5

    @pytest.mark.parametrize(("penalty", "expected"), [("l2", 9.0), ("l1", 3.0)])
    def test_ramp_by_hand(self, penalty: str, expected: float, device: torch.device) -> None:
        rows, columns, _ = identity_grid((5, 4, 7), device=device)
        # Component 0 rises by 3 along axis 0, component 2 by 3 along axis 1: two of nine differences are 3.
        ddf = field(3 * rows, 0 * rows, 3 * columns)
        assert Diffusion(penalty)(ddf).item() == pytest.approx(2 / 9 * expected)
        total = Diffusion(penalty, reduction="frobenius")(ddf).item()
        assert total == pytest.approx(expected * (4 / 5 + 3 / 4))

    def test_translation_is_free_and_a_checkerboard_is_not(self) -> None:
        rows, columns = identity_grid((6, 8))
        board = field((-1) ** (rows + columns), (-1) ** (rows + columns))
        assert Diffusion()(torch.full((1, 2, 6, 8), 7.3)).item() == 0
        assert monai.losses.DiffusionLoss()(board).item() == 0  # why central differences will not do
        assert Diffusion()(board).item() == 4.0

    @pytest.mark.parametrize("penalty", ["l1", "l2"])
    @pytest.mark.parametrize("reduction", ["mean", "frobenius"])
    def test_spacing_measures_in_mm(self, penalty: str, reduction: str) -> None:
        power = 1 if penalty == "l1" else 2
        rows, columns = identity_grid((5, 5), dtype=torch.float64)
        spacing = (2.0, 0.5)
        loss, plain = Diffusion(penalty, spacing, reduction), Diffusion(penalty, None, reduction)
        zero = torch.zeros_like(rows)
        along = loss(field(zero, rows)).item() / plain(field(zero, rows)).item()
        assert along == pytest.approx((0.5 / 2.0) ** power)  # 0.5 mm of displacement over 2 mm
        across = loss(field(columns, zero)).item() / plain(field(columns, zero)).item()
        assert across == pytest.approx((2.0 / 0.5) ** power)
        assert loss(field(rows, columns)).item() == pytest.approx(plain(field(rows, columns)).item())
        ddf = torch.rand(2, 2, 5, 5, dtype=torch.float64)
        assert Diffusion(penalty, 3.0, reduction)(ddf).item() == pytest.approx(plain(ddf).item())

    def test_weight(self) -> None:
        ddf, weight = torch.rand(2, 3, 5, 6, 4), torch.rand(2, 1, 5, 6, 4)
        assert Diffusion()(ddf, torch.ones_like(weight)).item() == pytest.approx(Diffusion()(ddf).item(), rel=1e-6)
        assert Diffusion()(ddf, 0.3 * torch.ones_like(weight)).item() == pytest.approx(0.3 * Diffusion()(ddf).item())
        edge, upper = Diffusion(), Diffusion(weight_at="upper")
        flipped = ddf.flip(2), weight.flip(2)
        assert edge(*flipped).item() == pytest.approx(edge(ddf, weight).item(), rel=1e-6)
        assert abs(upper(*flipped).item() - upper(ddf, weight).item()) > 1e-4
        physical = Diffusion(spacing=(1.0, 2.0, 0.7))
        assert physical(ddf, torch.ones_like(weight)).item() == pytest.approx(physical(ddf).item(), rel=1e-6)

    def test_axis_of_one_voxel(self) -> None:
        ddf = torch.rand(1, 3, 6, 1, 5)
        parts = [ddf.diff(dim=2).square().mean(), ddf.diff(dim=4).square().mean()]
        assert Diffusion()(ddf).item() == pytest.approx((sum(parts) / 3).item())

    @pytest.mark.parametrize("penalty", ["l1", "l2"])
    @pytest.mark.parametrize("shape", [(2, 2, 4, 3), (1, 3, 3, 2, 4)])
    def test_gradcheck(self, shape: tuple[int, ...], penalty: str) -> None:
        ddf = torch.rand(shape, dtype=torch.float64).requires_grad_()
        weight = torch.rand((shape[0], 1, *shape[2:]), dtype=torch.float64).requires_grad_()
        for loss in (Diffusion(penalty, (1.0, 2.0, 0.5)[: shape[1]]), Diffusion(penalty, reduction="frobenius")):
            assert torch.autograd.gradcheck(loss, (ddf,))
            assert torch.autograd.gradcheck(loss, (ddf, weight))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"\(B, 2, H, W\) or \(B, 3, H, W, D\), got shape \(1, 2, 4, 4, 4\)"):
            Diffusion()(torch.zeros(1, 2, 4, 4, 4))
        with pytest.raises(ValueError, match="penalty must be one of"):
            Diffusion("l3")
        with pytest.raises(ValueError, match="reduction must be one of"):
            Diffusion(reduction="sum")
        with pytest.raises(ValueError, match="spacing must be positive"):
            Diffusion(spacing=(1.0, 0.0))
        with pytest.raises(ValueError, match="has 2 numbers but ddf has 3 axes"):
            Diffusion(spacing=(1.0, 2.0))(torch.zeros(1, 3, 4, 4, 4))
        with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 4, 5\)"):
            Diffusion()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 5))
        with pytest.raises(TypeError, match="ddf must be a tensor"):
            Diffusion()([1.0])


class TestBendingEnergy:
    def test_quadratic_by_hand(self, device: torch.device) -> None:
        rows, columns, _ = identity_grid((6, 5, 7), device=device)
        # u0 = r² has u_rr = 2; u1 = 3 r c has u_rc = 3: (4 + 2 * 9) / 3 components.
        assert BendingEnergy()(field(rows * rows, 3 * rows * columns, 0 * rows)).item() == pytest.approx(22 / 3)

    @pytest.mark.parametrize("shape", [(7, 6), (5, 6, 7)])
    def test_monai_where_it_is_the_same(self, shape: tuple[int, ...]) -> None:
        grid = identity_grid(shape, dtype=torch.float64)
        dims = len(shape)
        quadratic = torch.rand(dims, dims, dims, dtype=torch.float64)
        ddf = torch.einsum("kab,a...,b...->k...", quadratic, grid, grid).unsqueeze(0)
        assert BendingEnergy()(ddf).item() == pytest.approx(monai.losses.BendingEnergyLoss()(ddf).item(), rel=1e-10)

    def test_monai_on_a_smooth_field(self) -> None:
        waves = torch.sin(identity_grid((64, 64), dtype=torch.float64) / 12)
        ddf = field(waves[0] * waves[1], waves[0] + waves[1] ** 2)
        assert BendingEnergy()(ddf).item() == pytest.approx(monai.losses.BendingEnergyLoss()(ddf).item(), rel=0.1)

    @pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)])
    def test_affine_is_free(self, shape: tuple[int, ...]) -> None:
        grid = identity_grid(shape)
        ddf = torch.einsum("ka,a...->k...", torch.rand(len(shape), len(shape)), grid).unsqueeze(0) + 3
        assert BendingEnergy()(ddf).item() == pytest.approx(0.0, abs=1e-10)

    def test_spacing_measures_per_mm(self) -> None:
        rows, columns = identity_grid((6, 7), dtype=torch.float64)
        zero, spacing = torch.zeros_like(rows), (2.0, 0.5)
        loss = BendingEnergy(spacing)
        # In mm: y = 2 r, so a displacement r² voxels = 2 r² mm = y²/2 mm has the second derivative 1 / mm.
        assert loss(field(rows * rows, zero)).item() == pytest.approx(1.0 / 2)
        assert loss(field(zero, rows * rows)).item() == pytest.approx(0.25**2 / 2)
        # u0 = r c voxels = 2 (y / 2) (x / 0.5) = 2 y x mm: twice the mixed term 2².
        assert loss(field(rows * columns, zero)).item() == pytest.approx(2 * 4.0 / 2)
        ddf = torch.rand(1, 2, 6, 7, dtype=torch.float64)
        assert BendingEnergy(3.0)(ddf).item() == pytest.approx(BendingEnergy()(ddf).item() / 9)

    def test_sees_alternating_fields(self) -> None:
        rows, columns = identity_grid((6, 6))
        board = (-1) ** (rows + columns)
        assert BendingEnergy()(field(board, 0 * board)).item() == pytest.approx((16 + 16 + 2 * 16) / 2)

    def test_short_axes_leave_terms_out(self) -> None:
        ddf = torch.rand(1, 3, 5, 1, 2)
        parts = ddf.diff(n=2, dim=2).square().mean() + 2 * ddf.diff(dim=2).diff(dim=4).square().mean()
        assert BendingEnergy()(ddf).item() == pytest.approx(parts.item(), rel=1e-6)
        assert BendingEnergy()(torch.rand(1, 2, 1, 1)).item() == 0

    @pytest.mark.parametrize("shape", [(2, 2, 4, 5), (1, 3, 3, 4, 3)])
    def test_gradcheck(self, shape: tuple[int, ...]) -> None:
        ddf = torch.rand(shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(BendingEnergy(), (ddf,))
        assert torch.autograd.gradcheck(BendingEnergy((1.0, 3.0, 0.7)[: shape[1]]), (ddf,))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="BendingEnergy: ddf must be"):
            BendingEnergy()(torch.zeros(1, 1, 4, 4))
        with pytest.raises(ValueError, match="spacing must be positive"):
            BendingEnergy(spacing=-1.0)


@pytest.mark.parametrize("loss", [Diffusion(), Diffusion("l1", (1.0, 2.0)), BendingEnergy()], ids=repr)
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, loss: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        ddf = (torch.rand(1, 2, 6, 5, device=device) * 3).to(dtype).requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(ddf)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(ddf.detach().double()).item(), rel=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, ddf)[0]).all()

    def test_pieces_do_not_show(self, loss: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        ddf = torch.rand(3, 2, 6, 5).requires_grad_()
        whole = loss(ddf)
        (expected,) = torch.autograd.grad(whole, ddf)
        monkeypatch.setattr(module, "_PIECE_CPU", 1)
        torch.testing.assert_close(loss(ddf), whole)
        torch.testing.assert_close(torch.autograd.grad(loss(ddf), ddf)[0], expected)

    def test_strided_field(self, loss: torch.nn.Module) -> None:
        ddf = torch.rand(1, 6, 5, 2).permute(0, 3, 1, 2).requires_grad_()
        value = loss(ddf)
        assert value.item() == pytest.approx(loss(ddf.detach().contiguous()).item(), rel=1e-6)
        copy = ddf.detach().contiguous().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(value, ddf)[0], torch.autograd.grad(loss(copy), copy)[0])

    def test_no_gradient_no_graph(self, loss: torch.nn.Module) -> None:
        assert not loss(torch.rand(1, 2, 6, 5)).requires_grad
        with torch.no_grad():
            assert not loss(torch.rand(1, 2, 6, 5, requires_grad=True)).requires_grad

    def test_not_twice(self, loss: torch.nn.Module) -> None:
        ddf = torch.rand(1, 2, 6, 5, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(ddf), ddf, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()
