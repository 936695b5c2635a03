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
"""Losses of the fields on the way."""

from __future__ import annotations

import pytest
import torch

from common.losses import MSE, DeepSupervision, Diffusion


def test_each_coarser_field_counts_half_of_the_next_and_the_last_not_at_all() -> None:
    moving, fixed = torch.zeros(1, 1, 6, 5), torch.full((1, 1, 6, 5), 2.0)
    pyramid = [torch.zeros(1, 2, 6, 5) for _ in range(4)]
    # the mean squared difference is 4 whatever the field
    assert DeepSupervision(MSE())(moving, fixed, pyramid).item() == pytest.approx(4 * (1 / 2 + 1 / 4 + 1 / 8))
    assert DeepSupervision(MSE(), decay=1.0)(moving, fixed, pyramid).item() == pytest.approx(12)
    assert DeepSupervision(MSE())(moving, fixed, pyramid[:1]).item() == 0


def test_every_field_moves_the_image_and_is_held_smooth() -> None:
    moving = torch.arange(8.0).expand(1, 1, 4, 8)
    fixed = (moving + 1).clamp_max(7)
    shift = torch.zeros(1, 2, 4, 8)
    shift[:, 1] = 1
    loss = DeepSupervision(MSE(), Diffusion(), smoothness_weight=3.0)
    assert loss(moving, fixed, [shift, torch.zeros_like(shift)]).item() == 0  # a translation that fits and is smooth
    rough = shift + torch.randn(shift.shape, generator=torch.Generator().manual_seed(0))
    without = DeepSupervision(MSE())(moving, fixed, [rough, shift])
    expected = without + 0.5 * 3 * Diffusion()(rough)
    assert loss(moving, fixed, [rough, shift]).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        DeepSupervision(MSE(), decay=decay)
