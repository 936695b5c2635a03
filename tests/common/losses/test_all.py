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
"""What holds for every loss."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

import common.losses as losses


def image() -> Tensor:
    return torch.rand(2, 1, 8, 9)


def mask() -> Tensor:
    return (torch.rand(2, 1, 8, 9) > 0.3).float()


def label() -> Tensor:
    return torch.randint(0, 3, (2, 1, 8, 9))


def field() -> Tensor:
    return 2 * torch.randn(2, 2, 8, 9)


def triplet() -> Tensor:
    return 2 * torch.randn(3, 2, 8, 9)


CASES: dict[str, tuple[nn.Module, tuple]] = {
    "LNCC": (losses.LNCC(5), (image, image, mask)),
    "MSE": (losses.MSE(), (image, image, mask)),
    "GlobalNCC": (losses.GlobalNCC(), (image, image, mask)),
    "MutualInformation": (losses.MutualInformation(), (image, image, mask)),
    "SoftDice": (losses.SoftDice(), (image, image, mask)),
    "SoftDice of labels": (losses.SoftDice([1, 2]), (label, label, mask)),
    "WarpedLabelDice": (losses.WarpedLabelDice([1, 2]), (label, label, field, mask)),
    "Diffusion": (losses.Diffusion(), (field, mask)),
    "BendingEnergy": (losses.BendingEnergy(), (field,)),
    "GroupConsistency": (losses.GroupConsistency(), (triplet, triplet)),
    "NonDiffeomorphicVolume": (losses.NonDiffeomorphicVolume(), (field, mask)),
    "GaussianKL": (losses.GaussianKL(), (image, image, image, image)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Tensor]]:
    loss, makers = CASES[request.param]
    return copy.deepcopy(loss), [make() for make in makers]


def test_every_public_loss_is_among_the_cases() -> None:
    public = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)}
    assert public - {"WeightedLosses", "DeepSupervision"} == {name.split()[0] for name in CASES}


def test_scalar_float32_on_the_device_of_its_inputs(case: tuple[nn.Module, list[Tensor]], device: torch.device) -> None:
    loss, inputs = case
    value = loss.to(device)(*(tensor.to(device) for tensor in inputs))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, device.type)
    assert value.item() == pytest.approx(loss.cpu()(*inputs).item(), rel=1e-4)


def test_meta_data_is_left_behind_and_inputs_are_untouched(case: tuple[nn.Module, list[Tensor]]) -> None:
    loss, inputs = case
    before = [tensor.clone() for tensor in inputs]
    value = loss(*(MetaTensor(tensor.clone()) for tensor in inputs))
    assert type(value) is Tensor
    assert value.item() == pytest.approx(loss(*inputs).item(), rel=1e-6)
    assert all(torch.equal(tensor, same) for tensor, same in zip(inputs, before, strict=True))


def test_strides_do_not_matter(case: tuple[nn.Module, list[Tensor]]) -> None:
    loss, inputs = case
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]
    assert loss(*strided).item() == pytest.approx(loss(*inputs).item(), rel=1e-5)


def test_no_state(case: tuple[nn.Module, list[Tensor]]) -> None:
    loss, _ = case
    assert not loss.state_dict()  # so that a checkpoint of a trainer does not depend on its losses
