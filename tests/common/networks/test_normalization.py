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

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.networks import InstanceNorm, normalize_and_activate


def _norm(channels: int, dtype: torch.dtype = torch.float32) -> InstanceNorm:
    norm = InstanceNorm(channels, affine=True).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 2), (1, 1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_as_one_operation_after_the_other(size: Sequence[int], count: int, device: torch.device) -> None:
    branches = [
        (torch.randn(2, 3, *size, device=device, requires_grad=True), _norm(3).to(device)) for _ in range(count)
    ]
    leaves = [leaf for x, norm in branches for leaf in (x, norm.weight, norm.bias)]
    ours = normalize_and_activate(*branches, slope=0.2)
    plain = F.leaky_relu(sum((norm(x) for x, norm in branches), torch.zeros((), device=device)), 0.2)
    torch.testing.assert_close(ours, plain)
    weights = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad(out, leaves, weights) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(normalize_and_activate(*branches, slope=0.2), plain)
        kept = [x.clone() for x, _ in branches]
        torch.testing.assert_close(normalize_and_activate(*branches, slope=0.2, overwrite=True), plain)
        if len(kept) > 1 and plain[0, 0].numel() > 1:
            assert not torch.equal(branches[0][0], kept[0])


def test_nothing_is_overwritten_while_a_gradient_is_recorded() -> None:
    x = torch.randn(1, 2, 4, 4)
    before = x.clone()
    normalize_and_activate((x, _norm(2)), slope=0.2, overwrite=True)
    assert torch.equal(x, before)


def test_gradient() -> None:
    norm = _norm(2, torch.float64)

    def operation(x: Tensor, y: Tensor) -> Tensor:
        return normalize_and_activate((x, norm), (y, norm), slope=0.3)

    x, y = (torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(operation, (x, y))


def test_the_maps_between_are_not_kept() -> None:
    x, y = (torch.randn(1, 2, 8, 8, requires_grad=True) for _ in range(2))
    out = normalize_and_activate((x, _norm(2)), (y, _norm(2)), slope=0.2)
    large = {t.data_ptr() for t in out.grad_fn.saved_tensors if t.numel() == x.numel()}
    assert large == {x.data_ptr(), y.data_ptr(), out.data_ptr()}


def test_half_precision_stays(device: torch.device) -> None:
    x = torch.randn(1, 2, 5, 4, device=device).bfloat16().requires_grad_()
    norm = _norm(2).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = normalize_and_activate((x, norm), slope=0.2)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16 and norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), F.leaky_relu(norm(x.float()), 0.2), atol=0.03, rtol=0.02)


def test_what_it_cannot_do_it_says() -> None:
    x = torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="slope must be positive"):
        normalize_and_activate((x, _norm(2)), slope=0)
    with pytest.raises(ValueError, match="affine"):
        normalize_and_activate((x, InstanceNorm(2)), slope=0.2)
