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
"""Soft Dice."""

from __future__ import annotations

import monai
import pytest
import torch

from common.losses import SoftDice, WarpedLabelDice, one_hot


class TestOneHot:
    def test_by_hand(self) -> None:
        label = torch.tensor([[[0, 2, 5]]], dtype=torch.uint8)
        assert one_hot(label, [2, 5, 9]).tolist() == [[[0, 1, 0], [0, 0, 1], [0, 0, 0]]]

    def test_needs_one_channel(self) -> None:
        with pytest.raises(ValueError, match=r"\(B, 1, \*S\), got shape \(1, 2, 3\)"):
            one_hot(torch.zeros(1, 2, 3, dtype=torch.long), [1])


class TestSoftDice:
    def test_by_hand(self) -> None:
        moved, fixed = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
        assert SoftDice()(moved, fixed).item() == pytest.approx(1 - 2 / 3)
        assert SoftDice()(fixed, fixed).item() == 0
        assert SoftDice()(1 - moved, moved).item() == 1

    @pytest.mark.parametrize("include_background", [True, False])
    @pytest.mark.parametrize("shape", [(7, 9), (5, 6, 7)])
    def test_monai(self, include_background: bool, shape: tuple[int, ...]) -> None:
        moved, fixed = torch.rand(2, 2, 4, *shape).softmax(2)
        theirs = monai.losses.DiceLoss(include_background=include_background, smooth_nr=0, smooth_dr=1e-12)
        ours = SoftDice(include_background=include_background)
        assert ours(moved, fixed).item() == pytest.approx(theirs(moved, fixed).item(), rel=1e-5)

    def test_absent_labels_are_left_out(self) -> None:
        moved, fixed = torch.zeros(2, 1, 3, 8)
        moved[0, 0, :4], fixed[0, 0, 2:6] = 1, 1  # Dice 0.5
        assert SoftDice()(moved, fixed).item() == pytest.approx(0.5)
        fixed[0, 2, 7] = 1  # only in one: Dice 0
        assert SoftDice()(moved, fixed).item() == pytest.approx(0.75)

    def test_nothing_at_all(self) -> None:
        moved = torch.zeros(1, 2, 4, 4, requires_grad=True)
        value = SoftDice()(moved, torch.zeros(1, 2, 4, 4))
        assert value.item() == 0
        assert torch.isfinite(torch.autograd.grad(value, moved)[0]).all()

    def test_integers(self) -> None:
        moved, fixed = torch.randint(0, 4, (2, 2, 1, 6, 7), dtype=torch.int16)
        expected = SoftDice()(one_hot(moved, [1, 3]), one_hot(fixed, [1, 3])).item()
        assert SoftDice([1, 3])(moved, fixed).item() == pytest.approx(expected)
        assert SoftDice([1, 3])(one_hot(moved, [1, 3]), fixed).item() == pytest.approx(expected)
        with pytest.raises(ValueError, match=r"moved holds torch.int16 labels"):
            SoftDice()(moved, fixed)

    def test_mask(self) -> None:
        moved, fixed = torch.rand(2, 2, 3, 6, 5)
        mask = (torch.rand(1, 1, 6, 5) > 0.4).float()
        inside = mask[0, 0] > 0
        expected = SoftDice()(moved[..., inside], fixed[..., inside]).item()
        moved[..., ~inside] = float("nan")
        assert SoftDice()(moved, fixed, mask).item() == pytest.approx(expected, rel=1e-5)

    def test_half_precision_counts_beyond_its_range(self, device: torch.device) -> None:
        label = torch.ones(1, 1, 70, 70, 20, dtype=torch.float16, device=device)  # 98000 voxels; fp16 ends at 65504
        with torch.autocast(device.type, dtype=torch.bfloat16):
            assert SoftDice()(label, label).item() == pytest.approx(0.0, abs=1e-6)

    def test_gradcheck(self) -> None:
        moved, fixed = (torch.rand((2, 2, 3, 4), dtype=torch.float64).requires_grad_() for _ in range(2))
        assert torch.autograd.gradcheck(SoftDice(), (moved, fixed))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="distinct and at least one"):
            SoftDice([])
        with pytest.raises(ValueError, match="distinct and at least one"):
            SoftDice([1, 1])
        with pytest.raises(ValueError, match=r"\(1, 2, 4\) but fixed has shape \(1, 3, 4\)"):
            SoftDice()(torch.rand(1, 2, 4), torch.rand(1, 3, 4))
        with pytest.raises(TypeError, match="moved must be a tensor"):
            SoftDice()([1], torch.rand(1, 2, 4))


class TestWarpedLabelDice:
    @pytest.mark.parametrize("dims", [2, 3])
    def test_identity_is_plain_dice(self, dims: int) -> None:
        moving, fixed = torch.randint(0, 3, (2, 1, 1, *[6, 7, 5][:dims]))
        ddf = torch.zeros(1, dims, *moving.shape[2:])
        assert WarpedLabelDice([1, 2])(moving, fixed, ddf).item() == pytest.approx(
            SoftDice([1, 2])(moving, fixed).item()
        )

    def test_gradient_moves_the_label_home(self) -> None:
        moving, fixed = torch.zeros(2, 1, 1, 12, 12, dtype=torch.uint8)
        fixed[..., 3:7, 3:7], moving[..., 3:7, 5:9] = 1, 1
        shift = torch.zeros(1, 2, 1, 1, requires_grad=True)
        loss = WarpedLabelDice([1])
        before = loss(moving, fixed, shift.expand(1, 2, 12, 12))
        (slope,) = torch.autograd.grad(before, shift)
        assert slope[0, 1].item() < -1e-3  # the field has to point to where the moving label is
        home = torch.zeros(1, 2, 12, 12)
        home[:, 1] = 2
        assert loss(moving, fixed, home).item() == pytest.approx(0.0, abs=1e-6)

    def test_field_is_checked(self) -> None:
        with pytest.raises(ValueError, match="WarpedLabelDice: ddf must be"):
            WarpedLabelDice([1])(*torch.ones(2, 1, 1, 4, 4, dtype=torch.long), torch.zeros(1, 3, 4, 4))
