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
from torch import Tensor

from common.engines.spline_flow import SplineFlow
from common.spatial import bspline_displacement, compose, identity_grid, integrate, warp

SIZES = [(37, 30), (17, 15, 20), (4, 3)]


def some_points(flow: SplineFlow, amplitude: float = 0.3, device: str | torch.device = "cpu") -> Tensor:
    """Control points, in spacings, of a velocity that changes little from one to the next."""
    points = flow.control_points(torch.zeros(1, len(flow.size)))
    points = torch.randn(points.shape, generator=torch.Generator().manual_seed(3)).to(device)
    for _ in range(8):
        points = bspline_displacement(points, 1)
    return amplitude * points / points.std()


def inner(field: Tensor, margin: int = 4) -> Tensor:
    """The field without its border, where flows may leave the grid, if there is anything else."""
    wide = min(field.shape[2:]) > 2 * margin + 2
    return field[(..., *(slice(margin, -margin) for _ in field.shape[2:]))] if wide else field


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spacing", [1, 2, 3, 4])
def test_it_is_the_flow_of_the_spline(size: tuple[int, ...], spacing: int, device: torch.device) -> None:
    flow = SplineFlow(size, spacing, 5)
    points = some_points(flow, device=device)
    expected = integrate(bspline_displacement(points, spacing, size), 7)
    found = flow.displacement(points)
    assert found.shape == (1, len(size), *size) and found.device == points.device
    error = inner(found - expected).norm(dim=1).mean()
    assert float(error) < 0.04 * float(inner(expected).norm(dim=1).mean())


@pytest.mark.parametrize("size", SIZES)
def test_half_the_resolution_flows_to_the_same_places(size: tuple[int, ...]) -> None:
    flow = SplineFlow(size, 3, 4)
    points = some_points(flow)
    blocks = [-(-n // 2) for n in size]
    half = 2 * flow.displacement(points, [2] * len(size))
    assert half.shape[2:] == tuple(blocks)
    # The full field at the blocks' middles.
    full = warp(flow.displacement(points), identity_grid(blocks)[None] + 0.5)
    assert float(inner(half - full, 2).norm(dim=1).mean()) < 0.04 * float(inner(full, 2).norm(dim=1).mean())


def test_axes_may_differ_in_resolution() -> None:
    flow = SplineFlow((20, 22), 3, 4)
    points = some_points(flow)
    found = flow.displacement(points, [2, 1]) * torch.tensor([2.0, 1.0]).view(1, 2, 1, 1)
    assert found.shape == (1, 2, 10, 22)
    rows = (flow.displacement(points)[:, :, 0::2] + flow.displacement(points)[:, :, 1::2]) / 2
    assert float((found - rows).norm(dim=1).mean()) < 0.04 * float(rows.norm(dim=1).mean())


@pytest.mark.parametrize("size", SIZES[:2])
def test_the_other_way_leads_back(size: tuple[int, ...]) -> None:
    flow = SplineFlow(size, 3, 4)
    there, back = flow.displacement(some_points(flow)), flow.displacement(-some_points(flow))
    assert float(inner(compose(there, back)).norm(dim=1).mean()) < 0.04 * float(inner(there).norm(dim=1).mean())


@pytest.mark.parametrize("voxels", [[1, 1], [2, 2]])
def test_equal_control_points_shift_everything(voxels: list[int]) -> None:
    flow = SplineFlow((11, 8), 3, 4)
    points = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand_as(flow.control_points(torch.zeros(1, 2)))
    found = flow.displacement(points, voxels)
    torch.testing.assert_close(found, (points[..., :1, :1] * 3 / voxels[0]).expand_as(found))


def test_what_moves_nothing_far_off_moves_nothing_here() -> None:
    flow = SplineFlow((72, 9), 3, 4)
    points = flow.control_points(torch.zeros(1, 2))
    assert points.shape == (1, 2, 24, 3)
    points[:, :, :8] = 0.2
    found = flow.displacement(points)
    # Two control points' reach, that of the flow, and three of its places.
    assert not found[:, :, 3 * 8 + 6 + 4 + 6 :].any() and found[:, :, :24].all()


def test_the_gradient_is_that_of_the_displacement() -> None:
    flow = SplineFlow((7, 6), 3, 2)
    points = (0.1 * torch.randn(1, 2, 3, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(flow.displacement, points)
