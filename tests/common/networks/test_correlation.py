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

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.networks import both_ways, local_correlation, neighbourhood


def _direct(a: Tensor, b: Tensor, radius: int, padding: str) -> Tensor:
    """The definition, voxel by voxel."""
    size, scale = a.shape[2:], a.shape[1] ** -0.5
    out = torch.zeros(len(a), (2 * radius + 1) ** len(size), *size)
    for n, offset in enumerate(itertools.product(range(-radius, radius + 1), repeat=len(size))):
        for p in itertools.product(*(range(count) for count in size)):
            q = [x + o for x, o in zip(p, offset, strict=True)]
            inside = [min(max(x, 0), count - 1) for x, count in zip(q, size, strict=True)]
            if padding == "zeros" and inside != q:
                continue
            out[(slice(None), n, *p)] = scale * (a[(..., *p)] * b[(..., *inside)]).sum(1)
    return out


def _maps(size: Sequence[int], channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(2, channels, *size, dtype=dtype, requires_grad=True) for _ in range(2))
    return a, b


@pytest.fixture(params=["one slab", "slabs"])
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps fit into one slab; here also with one row a slab."""
    if request.param == "slabs":
        monkeypatch.setattr(neighbourhood, "_CPU_SLAB", 1)
        monkeypatch.setattr(neighbourhood, "_DEVICE_SLAB", 1)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("size", [(5, 4), (4, 1, 3)])
def test_it_is_the_definition(size: Sequence[int], radius: int, padding: str, device: torch.device) -> None:
    a, b = _maps(size)
    expected = _direct(a, b, radius, padding)
    torch.testing.assert_close(local_correlation(a.to(device), b.to(device), radius, padding).cpu(), expected)


def test_parity_with_the_published_operation(shared: Path) -> None:
    arrays = np.load(shared / "parity/dual_stream_pyramid/local_correlation.npz")
    a, b = torch.from_numpy(arrays["a"]), torch.from_numpy(arrays["b"])
    ours = {
        "corr_ab_zero_r1": local_correlation(a, b),
        "corr_ba_zero_r1": local_correlation(b, a),
        "corr_ab_replicate_r1": local_correlation(a, b, padding="border"),
        "corr_ab_zero_r2": local_correlation(a, b, radius=2),
    }
    for name, value in ours.items():
        torch.testing.assert_close(value, torch.from_numpy(arrays[name]), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("size", "radius"), [((3, 4), 2), ((3, 2, 3), 1)])
def test_gradient(size: Sequence[int], radius: int, padding: str) -> None:
    a, b = _maps(size, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: local_correlation(x, y, radius, padding), (a, b), fast_mode=True)


def test_only_the_two_maps_are_kept_for_the_backward_pass() -> None:
    a, b = _maps((6, 5, 4))
    out = local_correlation(a, b)
    kept = {tensor.data_ptr() for tensor in out.grad_fn.saved_tensors}
    assert kept == {a.data_ptr(), b.data_ptr()}


def test_nothing_of_the_size_of_the_windows_is_made() -> None:
    channels, size = 16, (48, 24, 24)
    a, b = (torch.randn(1, channels, *size, requires_grad=True) for _ in range(2))
    volume = 4 * a[0, 0].numel()
    with torch.profiler.profile(profile_memory=True) as profile:
        local_correlation(a, b).backward(torch.ones(1, 27, *size))
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    # The result (27), the incoming gradient made here (27), the two gradients (16 each), and a few slabs.
    assert peak < (2 * 27 + 2 * channels) * volume + 3 * neighbourhood._CPU_SLAB


@pytest.mark.parametrize("radius", [1, 2])
@pytest.mark.parametrize("size", [(7, 5), (1, 6), (5, 3, 4)])
def test_the_other_way_round_without_a_multiplication(size: Sequence[int], radius: int, device: torch.device) -> None:
    a, b = (x.detach().to(device) for x in _maps(size))
    a.requires_grad_()
    turned = both_ways(local_correlation(a, b, radius))
    torch.testing.assert_close(turned, local_correlation(b, a, radius))
    weights = torch.randn_like(turned)
    (gradient,) = torch.autograd.grad((turned * weights).sum(), a)
    (expected,) = torch.autograd.grad((local_correlation(b, a, radius) * weights).sum(), a)
    torch.testing.assert_close(gradient, expected)


def test_half_precision_maps_are_summed_in_single_precision(device: torch.device) -> None:
    a = torch.full((1, 512, 3, 3), 1.0, dtype=torch.bfloat16, device=device, requires_grad=True)
    b = torch.ones_like(a)
    b.detach()[:, 1:] = 2**-9  # added one by one in bfloat16, none of these would count
    out = local_correlation(a, b)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and a.grad is not None and a.grad.dtype == torch.bfloat16
    assert out[0, 4, 1, 1].item() == pytest.approx((1 + 511 / 512) * 512**-0.5, rel=1e-2)


def test_what_it_cannot_take_it_names() -> None:
    a, b = _maps((4, 4))
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 3, 4, 3\)"):
        local_correlation(a, b[..., :3])
    with pytest.raises(ValueError, match="padding must be one of"):
        local_correlation(a, b, padding="reflect")
    with pytest.raises(ValueError, match="negative"):
        local_correlation(a, b, radius=-1)
    with pytest.raises(ValueError, match="26 channels"):
        both_ways(torch.zeros(1, 26, 3, 3, 3))
    with pytest.raises(ValueError, match="16 channels"):
        both_ways(torch.zeros(1, 16, 3, 3))
