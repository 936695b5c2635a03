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
import torch.nn.functional as F

from common.networks import convolution


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("channels", "stride"), [(2, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_the_convolution_of_torch_with_its_gradients(
    dims: int, channels: int, stride: int, batch: int, device: torch.device
) -> None:
    layer = convolution(dims, channels, 5, stride=stride).to(device)
    x = torch.randn(batch, channels, *(9, 8, 7)[:dims], device=device, requires_grad=True)
    reference = F.conv2d if dims == 2 else F.conv3d
    expected = reference(x, layer.weight, layer.bias, stride=stride, padding=1)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    inputs = (x, layer.weight, layer.bias)
    for a, b in zip(
        torch.autograd.grad(actual.cos().sum(), inputs), torch.autograd.grad(expected.cos().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_kernel_and_bias_options() -> None:
    layer = convolution(3, 8, 4, 1, bias=False)
    assert layer.bias is None
    assert layer(torch.rand(1, 8, 4, 5, 6)).shape == (1, 4, 4, 5, 6)


def test_double_precision_passes_through() -> None:
    layer = convolution(3, 8, 2).double()
    assert layer(torch.rand(1, 8, 4, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_gradients_of_a_few_voxels_under_autocast_are_those_of_float32_rounded() -> None:
    layer = convolution(3, 16, 16)
    x = torch.randn(2, 16, 2, 2, 2)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    for _ in range(30):
        leftovers = [torch.full((2**power,), torch.nan) for power in range(4, 20)]  # what fresh memory then holds
        del leftovers
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        (actual,) = torch.autograd.grad(y.float().square().sum(), layer.weight)
        torch.testing.assert_close(actual, expected, atol=0.02 * expected.abs().max().item(), rtol=0.02)
