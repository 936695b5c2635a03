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
from torch import nn

from common.networks import ConvUnit, FlowHead, InstanceNorm, UpStage, upsample_to


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_is_that_of_torch(shape: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape)
    ours = InstanceNorm(3, affine)
    theirs = (nn.InstanceNorm2d if len(shape) == 4 else nn.InstanceNorm3d)(3, affine=affine)
    if ours.weight is not None and ours.bias is not None:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
        theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    torch.testing.assert_close(ours(x), theirs(x))


def test_instance_norm_of_one_voxel_is_its_shift() -> None:
    x = torch.randn(2, 3, 1, 1, 1)
    assert torch.count_nonzero(InstanceNorm(3)(x)) == 0
    norm = InstanceNorm(3, affine=True)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(norm(x)[1, :, 0, 0, 0], torch.tensor([1.0, 2.0, 3.0]))


def test_a_unit_normalises_then_rectifies() -> None:
    out = ConvUnit(3, 2, 4)(torch.randn(1, 2, 6, 6, 6))
    # Undo the leaky ReLU: what was normalised has mean 0 and variance 1 in each channel.
    before = torch.where(out < 0, out / 0.01, out)
    torch.testing.assert_close(before.mean(dim=(2, 3, 4)), torch.zeros(1, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(before.var(dim=(2, 3, 4), unbiased=False), torch.ones(1, 4), atol=1e-3, rtol=0)


def test_a_unit_rectifies_then_normalises() -> None:
    unit, x = ConvUnit(3, 2, 4, activation_first=True), torch.randn(1, 2, 6, 6, 6)
    out = unit(x)
    assert out.mean((2, 3, 4)).abs().max() < 1e-5
    rectified = torch.nn.functional.leaky_relu(unit.conv(x), 0.01).flatten(2)
    deviation = (rectified.var(2, False, True) + 1e-5).sqrt()
    torch.testing.assert_close(out.flatten(2), (rectified - rectified.mean(2, True)) / deviation, atol=1e-5, rtol=1e-4)
    unit.activation_first = False
    torch.testing.assert_close(unit(x), torch.nn.functional.leaky_relu(unit.norm(unit.conv(x)), 0.01))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_several_maps_count_as_one(dims: int, bias: bool) -> None:
    unit = ConvUnit(dims, 6, 4, bias=bias, norm="batch").double()
    maps = [torch.randn(2, c, *(5, 6, 7)[:dims], dtype=torch.float64, requires_grad=True) for c in (1, 3, 2)]
    leaves = [*maps, *unit.parameters()]
    apart, together = unit(*maps), unit(torch.cat(maps, dim=1))
    torch.testing.assert_close(apart, together)
    weights = torch.randn_like(apart)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (apart, together)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation_first", [False, True])
@pytest.mark.parametrize("norm", ["instance", "instance_affine", "batch"])
def test_the_gradient_of_a_unit(norm: str, activation_first: bool) -> None:
    unit = ConvUnit(2, 2, 3, norm=norm, activation_first=activation_first).double()
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, x)


def test_a_unit_with_batch_norm_keeps_running_statistics() -> None:
    unit = ConvUnit(2, 2, 4, norm="batch")
    unit(torch.randn(2, 2, 8, 8) + 5)
    assert unit.norm.running_mean.abs().sum() > 0


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'layer'"):
        ConvUnit(2, 1, 1, norm="layer")


def test_upsampling_aligns_areas() -> None:
    up = upsample_to(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    torch.testing.assert_close(up, torch.tensor([[[[0.0, 1.0, 3.0, 4.0]]]]))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_stage_takes_the_size_of_its_skip(dims: int) -> None:
    coarse, fine = (2, 3, 2)[:dims], (5, 6, 3)[:dims]
    stage = UpStage(dims, 6, 4, 3)
    assert stage(torch.rand(1, 6, *coarse), torch.rand(1, 4, *fine)).shape == (1, 3, *fine)


def test_a_flow_head_starts_near_zero_and_stays_float32(device: torch.device) -> None:
    head = FlowHead(3, 4, bias=-10.0).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        field = head(torch.rand(1, 4, 5, 5, 5, device=device).to(torch.bfloat16))
    assert field.dtype == torch.float32
    assert field.shape == (1, 3, 5, 5, 5)
    torch.testing.assert_close(field, torch.full_like(field, -10.0), atol=1e-2, rtol=0)
