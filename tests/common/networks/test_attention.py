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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.networks import neighbourhood, vector_field_attention


def _maps(size: Sequence[int], radius: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    query = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    key = torch.randn(2, 3, *(n + 2 * radius for n in size), dtype=dtype, requires_grad=True)
    return query, key


def _direct(query: Tensor, key: Tensor, radius: int) -> Tensor:
    """All scores at once."""
    dims = query.ndim - 2
    windows = key
    for axis in range(2, query.ndim):
        windows = windows.unfold(axis, 2 * radius + 1, 1)
    windows = windows.flatten(query.ndim)  # (B, C, *S, n)
    weights = ((query.unsqueeze(-1) * windows).sum(1) * query.shape[1] ** -0.5).softmax(-1)
    offsets = torch.cartesian_prod(*[torch.arange(-radius, radius + 1.0)] * dims).to(weights)
    return (weights @ offsets).movedim(-1, 1)


@pytest.fixture(params=["one slab", "slabs"])
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "slabs":
        monkeypatch.setattr(neighbourhood, "_CPU_SLAB", 1)
        monkeypatch.setattr(neighbourhood, "_DEVICE_SLAB", 1)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize(("size", "radius"), [((5, 4), 1), ((1, 5), 2), ((4, 3, 5), 1)])
def test_it_is_the_softmax_over_all_neighbours(size: Sequence[int], radius: int, device: torch.device) -> None:
    query, key = _maps(size, radius)
    expected = _direct(query, key, radius)
    torch.testing.assert_close(vector_field_attention(query.to(device), key.to(device), radius).cpu(), expected)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("size", [(3, 4), (3, 2, 3)])
def test_gradient(size: Sequence[int]) -> None:
    assert torch.autograd.gradcheck(vector_field_attention, _maps(size, 1, torch.float64), fast_mode=True)


def test_parity_with_the_published_block(shared: Path) -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(shared / "parity/dual_stream_pyramid/vfa_block.npz").items()}
    projected = [
        F.conv3d(x, arrays["proj_w"], arrays["proj_b"], padding=1)
        for x in (arrays["fixed"], F.pad(arrays["moving"], (1,) * 6, mode="replicate"))
    ]
    torch.testing.assert_close(vector_field_attention(*projected), arrays["disp"], atol=1e-5, rtol=0)


def test_it_points_at_the_neighbour_that_fits() -> None:
    query = torch.zeros(1, 2, 3, 3)
    query[:, 0] = 50
    key = torch.zeros(1, 2, 5, 5)
    key[0, 0, 3, 1] = 50  # voxel (2, 0) of the map without its halo
    field = vector_field_attention(query, key)
    torch.testing.assert_close(field[0, :, 1, 1], torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(field[0, :, 0, 2], torch.zeros(2))


def test_only_query_and_key_are_kept_for_the_backward_pass() -> None:
    query, key = _maps((6, 5, 4))
    out = vector_field_attention(query, key)
    assert {t.data_ptr() for t in out.grad_fn.saved_tensors} == {query.data_ptr(), key.data_ptr()}


def test_fields_are_single_precision_under_autocast(device: torch.device) -> None:
    query, key = (x.detach().to(device, torch.bfloat16).requires_grad_() for x in _maps((5, 4, 3)))
    with torch.autocast(device.type, torch.bfloat16):
        field = vector_field_attention(query, key)
        field.square().sum().backward()
    assert field.dtype == torch.float32 and query.grad is not None and query.grad.dtype == torch.bfloat16
    expected = _direct(query.float(), key.float(), 1)
    torch.testing.assert_close(field, expected, atol=1e-5, rtol=1e-5)


def test_maps_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 2, 5, 6\)"):
        vector_field_attention(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 5, 6))
