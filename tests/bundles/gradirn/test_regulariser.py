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
"""The CPU's convolutions against PyTorch's plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bundles.gradirn.scripts.convolution import channels_last, convolve_leaky
from bundles.gradirn.scripts.regulariser import Regulariser


@pytest.mark.parametrize(
    "shape", [(1, 5, 6, 5, 4), (1, 8, 7, 4, 3), (1, 8, 1, 4, 3), (2, 5, 5, 3, 4), (1, 5, 2, 2, 2), (3, 4, 9, 7)]
)
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_values_and_gradients_are_those_of_the_plain_convolution(
    shape: tuple[int, ...], slope: float, device: torch.device
) -> None:
    conv = (nn.Conv2d if len(shape) == 4 else nn.Conv3d)(shape[1], 6, 3, padding=1).to(device)
    x = torch.randn(shape, device=device, requires_grad=True)
    wanted = (x, conv.weight, conv.bias)
    ours, plain = convolve_leaky(conv, channels_last(x), slope), F.leaky_relu(conv(x), slope)
    weights = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad((ours * weights).sum(), wanted),
        torch.autograd.grad((plain * weights).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_regulariser_starts_at_zero_and_learns(spatial_dims: int) -> None:
    regulariser = Regulariser(spatial_dims, spatial_dims + 2, 8, 3)
    x = torch.randn(1, spatial_dims + 2, *(7, 6, 5)[:spatial_dims])
    update = regulariser(x)
    assert update.shape == (1, spatial_dims, *x.shape[2:]) and not update.any()
    update.sum().backward()
    assert regulariser.last.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="at least 2 layers, got 1"):
        Regulariser(spatial_dims, 4, 8, 1)
