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
"""Consistency of triplets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from common.losses import GroupConsistency
from common.spatial import invert


def shifts(shape: tuple[int, ...], *vectors: tuple[float, ...]) -> Tensor:
    """One constant field a vector."""
    return torch.tensor(vectors).view(len(vectors), -1, *(1,) * len(shape)).expand(-1, -1, *shape).contiguous()


def test_shifts_that_lead_back_cost_nothing() -> None:
    ddf = shifts((9, 7), (1.0, 0.5), (-3.0, 1.0), (2.0, -1.5))
    assert GroupConsistency()(ddf).item() == pytest.approx(0, abs=1e-12)
    assert GroupConsistency()(ddf, -ddf).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(10, 8), (10, 6, 7)])
def test_shifts_that_miss(shape: tuple[int, ...], device: torch.device) -> None:
    """The last two lead 2 voxels to and fro along the first axis, which only 8 of 10 rows survive; 0.5 is missing."""
    rest = (0.0,) * (len(shape) - 1)
    ddf = shifts(shape, (0.5, *rest), (-2.0, *rest), (2.0, *rest)).to(device)
    expected = 0.8 * (0.5 * 2 / 10) ** 2
    assert GroupConsistency()(ddf).item() == pytest.approx(expected, rel=1e-5)
    # Backwards the first step is 0.5 to the left, which the first row does not survive, the second 2 to the right.
    backward = 0.7 * (0.5 * 2 / 10) ** 2
    assert GroupConsistency()(ddf, -ddf).item() == pytest.approx((expected + backward) / 2, rel=1e-5)


def test_only_where_fields_are_looked_up_must_be_inside() -> None:
    """Where the whole way ends does not matter: no field is looked up there."""
    ddf = shifts((5, 4), (100.0, 0.0), (0.0, 0.0), (0.0, 0.0))
    assert GroupConsistency()(ddf).item() == pytest.approx((100 * 2 / 5) ** 2)
    assert GroupConsistency()(ddf.roll(1, 0)).item() == 0


def test_units() -> None:
    ddf = shifts((10, 8), (0.5, 0.25), (0.0, 0.0), (0.0, 0.0))
    assert GroupConsistency()(ddf).item() == pytest.approx((0.25 + 0.0625) * (2 / 10) ** 2)
    assert GroupConsistency(7.0)(ddf).item() == pytest.approx(GroupConsistency()(ddf).item())
    # Extents 10 and 24 mm: half of the greater one is the unit.
    assert GroupConsistency((1.0, 3.0))(ddf).item() == pytest.approx((0.5 / 12) ** 2 + (0.75 / 12) ** 2)


def smooth(shape: tuple[int, ...], batch: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    field = torch.randn(batch, len(shape), *(3,) * len(shape), dtype=dtype)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return scale * torch.nn.functional.interpolate(field, shape, mode=mode, align_corners=True)


@pytest.mark.parametrize("shape", [(9, 8), (7, 6, 8)])
def test_against_scipy_one_lookup_after_another(shape: tuple[int, ...]) -> None:
    ddf, inverse = smooth(shape, 6, 1.5), smooth(shape, 6, 1.5)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)

    def cycle(*fields: Tensor) -> float:
        place, inside = grid.copy(), np.ones(shape, bool)
        for field in reversed(fields):
            inside &= np.all([(p >= 0) & (p <= n - 1) for p, n in zip(place, shape, strict=True)], axis=0)
            step = [map_coordinates(c, place, order=1, mode="nearest") for c in field.double().numpy()]
            place = place + np.stack(step)
        return float(((((place - grid) * 2 / max(shape)) ** 2).sum(0) * inside).mean())

    forward = (cycle(*ddf[:3]) + cycle(*ddf[3:])) / 2
    backward = (cycle(*inverse[:3].flip(0)) + cycle(*inverse[3:].flip(0))) / 2
    assert GroupConsistency()(ddf).item() == pytest.approx(forward, rel=1e-4)
    assert GroupConsistency()(ddf, inverse).item() == pytest.approx((forward + backward) / 2, rel=1e-4)


def test_fields_of_a_common_frame_are_consistent_both_ways() -> None:
    """phi_ij = p_i after the inverse of p_j, of three maps p from a common frame."""
    from common.spatial import compose

    to_image = smooth((24, 22), 3, 0.6)
    back = invert(to_image, tolerance=1e-5).ddf
    ddf = torch.cat([compose(to_image[i : i + 1], back[(i + 1) % 3 :][:1]) for i in range(3)])
    inverse = torch.cat([compose(to_image[(i + 1) % 3 :][:1], back[i : i + 1]) for i in range(3)])
    loss = GroupConsistency()
    assert loss(ddf, inverse).item() < 1e-4 * loss(ddf[[0, 0, 0]], inverse[[0, 0, 0]]).item() + 2e-6
    assert loss(ddf, inverse).item() < 0.05 * loss(ddf, inverse[[2, 1, 0]]).item(), "the way back has its own order"


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    ddf, inverse = (smooth(shape, 3, 0.4, torch.float64).requires_grad_() for _ in range(2))
    loss = GroupConsistency()
    assert loss(ddf, inverse).item() > 0
    assert torch.autograd.gradcheck(loss, (ddf, inverse), eps=1e-7, atol=1e-5)


def test_descent_leads_back() -> None:
    ddf = smooth((12, 12), 3, 1.0).requires_grad_()
    loss, optimiser = GroupConsistency(), torch.optim.Adam([ddf], lr=0.02)
    before = loss(ddf).item()
    for _ in range(100):
        optimiser.zero_grad()
        loss(ddf).backward()
        optimiser.step()
    assert loss(ddf).item() < 0.02 * before


def test_half_precision(device: torch.device) -> None:
    ddf = smooth((9, 8), 3, 1.5).to(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = GroupConsistency()(ddf)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(GroupConsistency()(ddf.float()).item(), rel=1e-6)


def test_pairs_that_are_no_triplets_are_refused() -> None:
    ddf, loss = torch.zeros(6, 2, 5, 5), GroupConsistency()
    moving, fixed = list("abcdef"), list("bcaefd")
    assert loss(ddf, ddf, moving, fixed).item() == 0
    for wrong in ("bcadef", "cabefd", "bcaefa"):
        with pytest.raises(ValueError, match=r"got \(moving, fixed\) \[\('a', '.'\).*sampler"):
            loss(ddf, ddf, moving, list(wrong))


def test_errors() -> None:
    with pytest.raises(ValueError, match="multiple of 3 items, got 4"):
        GroupConsistency()(torch.zeros(4, 2, 5, 5))
    with pytest.raises(ValueError, match=r"ddf has shape \(3, 2, 5, 5\), inverse_ddf \(3, 2, 5, 6\)"):
        GroupConsistency()(torch.zeros(3, 2, 5, 5), torch.zeros(3, 2, 5, 6))
    with pytest.raises(ValueError, match="GroupConsistency: ddf must be"):
        GroupConsistency()(torch.zeros(3, 3, 5, 5))
    with pytest.raises(ValueError, match="3 numbers but ddf has 2 axes"):
        GroupConsistency((1.0, 1.0, 2.0))(torch.zeros(3, 2, 5, 5))
    with pytest.raises(ValueError, match="spacing must be positive"):
        GroupConsistency(0.0)
