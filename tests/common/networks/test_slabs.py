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

from common.networks import DualStreamEncoder, InstanceNorm, ResidualBlock, convolve_by_slabs, residual_by_slabs, slabs


def _block(dims: int, stride: int) -> ResidualBlock:
    block = ResidualBlock(dims, 5, 8, stride)
    for module in block.modules():
        if isinstance(module, InstanceNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    return block


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(13, 7, 6), (1, 9, 9), (17, 20), (16, 5)])
@pytest.mark.parametrize("limit", [1, 500, 10**6])
def test_a_block_by_slabs(size: tuple[int, ...], stride: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = _block(len(size), stride), 3 + torch.randn(2, 5, *size)
    asked: list[int] = []

    def read(first: int, last: int) -> torch.Tensor:
        asked.append(last - first)
        return x[:, :, first:last]

    monkeypatch.setattr(slabs, "_CPU_SLAB", 10**9)
    with torch.no_grad():
        expected = block(x)
        monkeypatch.setattr(slabs, "_CPU_SLAB", limit)
        (found,) = residual_by_slabs(block, read, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert limit > 1 or max(asked) <= 3  # a row and its neighbours


@pytest.mark.parametrize("size", [(13, 7, 6), (17, 20)])
def test_a_convolution_by_slabs(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _block(len(size), 1).conv1, torch.randn(2, 5, *size)
    monkeypatch.setattr(slabs, "_CPU_SLAB", 500)
    with torch.no_grad():
        found = convolve_by_slabs(layer, lambda first, last: x[:, :, first:last], size)
        torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-5)


def test_an_encoder_by_slabs_with_and_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, x = DualStreamEncoder(2, 1, (4, 8)), torch.rand(2, 1, 13, 10)
    with torch.no_grad():
        expected = encoder(x)
        monkeypatch.setattr(slabs, "_CPU_SLAB", 100)
        torch.testing.assert_close(encoder(x), expected, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(encoder(x), expected, rtol=0, atol=0.15, check_dtype=False)


def test_no_slabs_where_a_gradient_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_CPU_SLAB", 1)
    block, x = _block(2, 1), torch.randn(1, 5, 6, 6, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None
