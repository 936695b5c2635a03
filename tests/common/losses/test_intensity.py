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
"""Similarity of whole images."""

from __future__ import annotations

import monai
import pytest
import torch
from torch import Tensor

from common.losses import MSE, GlobalNCC, MutualInformation

ALL = [MSE(), GlobalNCC(), MutualInformation()]


@pytest.fixture(params=[(9, 8), (6, 5, 7)], ids=["2-D", "3-D"])
def pair(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    moved, noise = torch.rand(2, 2, 1, *request.param)
    return moved, 0.6 * moved + 0.4 * noise


class TestMSE:
    def test_by_hand(self) -> None:
        assert MSE()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]])).item() == 6.5

    def test_torch(self, pair: tuple[Tensor, Tensor]) -> None:
        assert MSE()(*pair).item() == pytest.approx(torch.nn.functional.mse_loss(*pair).item())

    def test_mask_weighs(self) -> None:
        mask = torch.tensor([[[1.0, 0.5]]])
        assert MSE()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]]), mask).item() == pytest.approx(
            8.5 / 1.5
        )


class TestGlobalNCC:
    def test_published(self) -> None:
        k = torch.arange(36.0)
        moved, fixed = torch.sin(0.7 * k).view(1, 1, 6, 6), torch.cos(0.5 * k).view(1, 1, 6, 6)
        assert GlobalNCC()(moved, fixed).item() == pytest.approx(-0.003510808, rel=1e-5)

    @pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (-2.0, 5.0), (30.0, 1000.0)])
    def test_affine_intensities_do_not_matter(self, pair: tuple[Tensor, Tensor], scale: float, offset: float) -> None:
        moved, fixed = pair
        loss = GlobalNCC(1e-9)
        assert loss(scale * moved + offset, moved).item() == pytest.approx(-1.0, abs=1e-5)
        assert loss(scale * moved + offset, fixed).item() == pytest.approx(loss(moved, fixed).item(), abs=1e-4)

    def test_is_the_squared_pearson_correlation(self) -> None:
        moved, fixed = torch.rand(2, 1, 1, 7, 9, dtype=torch.float64)
        pearson = torch.corrcoef(torch.stack([moved.flatten(), fixed.flatten()]))[0, 1].item()
        assert GlobalNCC(1e-12)(moved, fixed).item() == pytest.approx(-(pearson**2), rel=1e-9)

    def test_each_item_and_channel_on_its_own(self) -> None:
        moved, fixed = torch.rand(2, 2, 3, 6, 5)
        parts = [
            GlobalNCC()(moved[b : b + 1, c : c + 1], fixed[b : b + 1, c : c + 1]) for b in range(2) for c in range(3)
        ]
        assert GlobalNCC()(moved, fixed).item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)

    def test_large_intensities_stay_in_range(self) -> None:
        moved = (torch.rand(1, 1, 40, 40, 40) * 1e5).requires_grad_()
        value = GlobalNCC()(moved, moved.detach().clone())
        assert value.item() == pytest.approx(-1.0, abs=1e-6)
        assert torch.isfinite(torch.autograd.grad(value, moved)[0]).all()

    def test_eps(self) -> None:
        with pytest.raises(ValueError, match="eps must be positive"):
            GlobalNCC(0.0)


class TestMutualInformation:
    def test_is_monais(self, pair: tuple[Tensor, Tensor]) -> None:
        theirs = monai.losses.GlobalMutualInformationLoss(num_bins=16)
        assert MutualInformation(16)(*pair).item() == pytest.approx(theirs(*pair).item(), rel=1e-6)

    def test_intensity_range(self, pair: tuple[Tensor, Tensor]) -> None:
        moved, fixed = pair
        scaled = MutualInformation(intensity_range=(-1000.0, 3000.0))(moved * 4000 - 1000, fixed * 4000 - 1000)
        assert scaled.item() == pytest.approx(MutualInformation()(moved, fixed).item(), rel=1e-4)

    def test_does_not_mind_inverted_contrast(self, pair: tuple[Tensor, Tensor]) -> None:
        moved, _ = pair
        other = torch.rand_like(moved)
        assert MutualInformation()(moved, 1 - moved).item() < MutualInformation()(moved, other).item() - 0.3

    def test_empty_mask_names_the_item(self, pair: tuple[Tensor, Tensor]) -> None:
        mask = torch.ones_like(pair[0])
        mask[1] = 0
        with pytest.raises(ValueError, match="batch item 1 holds no voxel"):
            MutualInformation()(*pair, mask)

    def test_range_must_rise(self) -> None:
        with pytest.raises(ValueError, match="must rise"):
            MutualInformation(intensity_range=(1.0, 1.0))


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
class TestAll:
    def test_mask_of_ones_is_none(self, loss: torch.nn.Module, pair: tuple[Tensor, Tensor]) -> None:
        mask = torch.ones((1, *pair[0].shape[1:]), dtype=torch.bool)
        assert loss(*pair, mask).item() == pytest.approx(loss(*pair).item(), rel=1e-5)

    def test_values_outside_a_mask_do_not_matter(self, loss: torch.nn.Module, pair: tuple[Tensor, Tensor]) -> None:
        moved, fixed = (image.clone() for image in pair)
        mask = (torch.rand_like(moved) > 0.3).float()
        value = loss(moved, fixed, mask).item()
        assert abs(value - loss(moved, fixed).item()) > 1e-6
        moved[mask == 0], fixed[mask == 0] = float("nan"), 0.9
        moved.requires_grad_()
        again = loss(moved, fixed, mask)
        assert again.item() == pytest.approx(value, rel=1e-5)
        assert (torch.autograd.grad(again, moved)[0][mask == 0] == 0).all()

    @pytest.mark.parametrize("values", [(0.0, 0.0), (0.7, 0.3), (1.0, 0.0)])
    def test_constant_images(self, loss: torch.nn.Module, values: tuple[float, float]) -> None:
        moved, fixed = (torch.full((1, 1, 6, 7, 5), value) for value in values)
        moved.requires_grad_()
        value = loss(moved, fixed)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, moved)[0]).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(
        self, loss: torch.nn.Module, pair: tuple[Tensor, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        loss = loss.to(device)
        moved, fixed = (image.to(device, dtype) for image in pair)
        moved.requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(moved, fixed)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss(moved.detach().float(), fixed.float()).item(), rel=1e-5)
        assert torch.isfinite(torch.autograd.grad(value, moved)[0]).all()
        loss.cpu()

    def test_shapes_are_both_named(self, loss: torch.nn.Module) -> None:
        with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\) but fixed has shape \(1, 1, 4, 5\)"):
            loss(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 5))
        with pytest.raises(ValueError, match=r"mask has shape \(1, 2, 4, 4\) but the images have shape \(1, 1, 4, 4\)"):
            loss(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), torch.ones(1, 2, 4, 4))
        with pytest.raises(ValueError, match="hold no voxel"):
            loss(torch.rand(1, 1, 0, 4), torch.rand(1, 1, 0, 4))


@pytest.mark.parametrize("loss", ALL[:2], ids=lambda loss: type(loss).__name__)
def test_gradcheck(loss: torch.nn.Module) -> None:
    moved, fixed = (torch.rand((2, 1, 3, 4), dtype=torch.float64).requires_grad_() for _ in range(2))
    mask = torch.rand((2, 1, 3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (moved, fixed))
    assert torch.autograd.gradcheck(lambda a, b: loss(a, b, mask), (moved, fixed))
