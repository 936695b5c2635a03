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

import math
from typing import Any

import pytest
import torch

from common.engines import pair_objective
from common.engines.pair_objective import PairObjective
from common.engines.spline_flow import SplineFlow
from common.spatial import digital_jacobian_determinants, non_diffeomorphic_volume


def objective(size: tuple[int, ...], spacing: int = 3, **more: Any) -> PairObjective:
    """Of two noise images and a start of no motion."""
    values = {name: torch.rand(1, 1, *size) for name in ("moving", "fixed")}
    fields = {name: torch.zeros(1, len(size), *size) for name in ("ddf", "inverse_ddf")}
    return PairObjective({**values, **fields, **more}, None, SplineFlow(size, spacing, 3))


@pytest.mark.parametrize("slab", [1, 60, 10**6])
@pytest.mark.parametrize("size", [(9, 8), (7, 6, 5), (3, 3, 3)])
def test_folds_are_found_slab_by_slab(size: tuple[int, ...], slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_objective, "_SLAB", slab)
    ddf = 0.8 * torch.randn(1, len(size), *size)
    volume, where = pair_objective._folded(ddf)
    assert volume > 0
    assert volume == pytest.approx(2 * math.factorial(len(size)) * float(non_diffeomorphic_volume(ddf)), rel=1e-5)
    inner = (0, 0, *(slice(1, -1) for _ in size))
    assert torch.equal(where[inner] > 0, (digital_jacobian_determinants(ddf) < 0).any(1)[0])
    assert where.sum() == where[inner].sum()


@pytest.mark.parametrize("size", [(1, 9), (9, 2), (2, 9, 9)])
def test_where_folds_cannot_be_told_nothing_is_begun(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="3 voxels"):
        objective(size)


@pytest.mark.parametrize(
    ("size", "spacing", "blocks"),
    [
        ((64, 70), 3, (32, 35)),
        ((63, 65), 3, (63, 33)),
        ((9, 64, 7), 2, (9, 32, 7)),
        ((63, 63), 3, None),
        ((70, 70), 1, None),
    ],
)
def test_which_axes_are_halved(
    size: tuple[int, ...], spacing: int, blocks: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert objective(size, spacing).coarser() is None  # not large enough
    monkeypatch.setattr(pair_objective, "_LARGE", 1)
    pair = objective(size, spacing, weight_map=torch.ones(1, 1, *size))
    rough = pair.coarser()
    if blocks is None:
        assert rough is None
        return
    assert rough is not None
    points = 0.1 * torch.randn_like(pair.control_points())
    assert rough.control_points().shape == points.shape
    assert {name: field.shape[2:] for name, field in rough.fields(points).items()} == dict.fromkeys(rough.start, blocks)
    assert rough.values["weight_map"].shape[2:] == blocks
    assert math.isfinite(float(rough.loss(points)))


def test_the_nearest_control_points_are_those_of_the_voxel() -> None:
    where = torch.zeros(1, 1, 30, 24)
    where[..., 13, 10] = 1  # in the block of control point (4, 3)
    near = pair_objective._near(where, 3, 0)[0, 0]
    assert near.shape == (10, 8) and near[4, 3] == near.max() and int((near > 0).sum()) == 9
    wide = pair_objective._near(where, 3, 2)[0, 0]
    assert int((wide == 1).sum()) == 9 and int((wide > 0).sum()) == 49


@pytest.mark.parametrize("size", [(60, 54), (45, 39, 42)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_fold_that_cannot_be_mended_does_not_cost_the_rest(size: tuple[int, ...], sign: int) -> None:
    folded = torch.zeros(1, len(size), *size)
    folded[(0, 0, *(n // 2 for n in size))] = 1.7
    pair = objective(size, inverse_ddf=folded)
    # One of the two signs widens the fold, and the less so the smaller the change is, but never not at all.
    points = torch.zeros_like(pair.control_points())
    for axis, count in enumerate(points.shape[2:]):
        wave = torch.sin(torch.arange(count) / 1.5).view(-1, *(1,) * (len(size) - 1 - axis))
        points[:, axis] = sign * 0.15 * wave
    found = pair.unfolded(points)
    for role, field in found.items():
        assert float(non_diffeomorphic_volume(field)) <= float(non_diffeomorphic_volume(pair.start[role]))
        assert float((field - pair.start[role]).norm(dim=1).mean()) > 0.05
