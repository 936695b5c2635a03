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
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.networks import RegistrationNetwork, SliceWise, VoxelMorph, for_stacks
from common.spatial import warp


class Mean(RegistrationNetwork):
    """Moves a whole slice by the mean of its moving image along axis 0, and of its fixed one along axis 1."""

    def __init__(self) -> None:
        super().__init__(2)

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        return {"ddf": image.mean((2, 3), keepdim=True).expand_as(image)}


def test_every_slice_has_the_field_of_its_own_images() -> None:
    image = torch.rand(2, 2, 6, 5, 3)
    ddf = SliceWise(Mean())(image)
    assert ddf.shape == (2, 3, 6, 5, 3) and not ddf[:, 2].any()
    for item in range(2):
        for z in range(3):
            expected = image[item, :, :, :, z].mean((1, 2))
            assert torch.allclose(ddf[item, :2, 2, 3, z], expected)


def test_a_stack_is_warped_as_its_slices_are(device: torch.device) -> None:
    network = VoxelMorph(2, encoder_channels=(4, 4), decoder_channels=(4, 4, 4)).to(device).eval()
    for parameter in network.head.parameters():
        torch.nn.init.normal_(parameter)
    image = torch.rand(1, 2, 21, 18, 4, device=device)
    with torch.no_grad():
        ddf = SliceWise(network)(image)
        slices = network(image[0].movedim(-1, 0))
    assert torch.allclose(ddf[0, :2].movedim(-1, 0), slices, atol=1e-5) and float(ddf.abs().max()) > 0.01
    whole = warp(image[:, :1], ddf)
    parts = warp(image[0, :1].movedim(-1, 0), slices)
    assert torch.allclose(whole[0].movedim(-1, 0), parts, atol=1e-5)


def test_a_choice_for_configs_and_a_check() -> None:
    network = Mean()
    assert for_stacks(network, False) is network and isinstance(for_stacks(network, True), SliceWise)
    with pytest.raises(ValueError, match="2-D network, got one with spatial_dims 3"):
        SliceWise(SliceWise(network))
    with pytest.raises(ValueError, match="3-D network takes"):
        SliceWise(network)(torch.rand(1, 2, 6, 5))
