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

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from common.metrics import TargetRegistrationError


def test_distance_in_millimetres_per_item(device: torch.device) -> None:
    points = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], [[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]], device=device)
    target = points + torch.tensor(
        [[[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]], device=device
    )
    values = TargetRegistrationError(spacing=(1.0, 1.0, 2.0))(points, target)
    assert values.cpu().tolist() == [[2.5], [2.0]]


def test_spacing_at_call_and_per_item() -> None:
    points, target = torch.zeros(2, 1, 2), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    metric = TargetRegistrationError(spacing=100.0)
    assert metric(points, target, torch.tensor([[2.0, 5.0], [2.0, 5.0]])).tolist() == [[2.0], [5.0]]


def test_padding_rows_do_not_count() -> None:
    nan = math.nan
    points = torch.tensor([[[0.0, 0.0], [nan, nan]], [[nan, nan], [nan, nan]]])
    values = TargetRegistrationError()(points, torch.tensor([[[0.0, 2.0], [1.0, 1.0]]] * 2))
    assert float(values[0]) == 2.0 and math.isnan(float(values[1]))


@pytest.mark.parametrize("definition", ["standard", "learn2reg"])
@pytest.mark.parametrize("dims", [2, 3])
def test_points_follow_the_pull_back_field(definition: str, dims: int) -> None:
    """A constant field (1, 2[, 3]) moves fixed point p to p + (1, 2[, 3]) of the moving image."""
    shift = torch.arange(1.0, dims + 1)
    ddf = shift.view(1, dims, *[1] * dims).expand(1, dims, *(9, 8, 10)[:dims]).clone()
    points = torch.full((1, 2, dims), 3.5)
    metric = TargetRegistrationError(definition=definition)
    assert float(metric(points, points + shift, None, ddf)) == pytest.approx(0.0, abs=1e-5)
    assert float(metric(points, points, None, ddf)) == pytest.approx(float(shift.norm()), rel=1e-5)


def test_learn2reg_reads_the_field_by_cubic_splines() -> None:
    ddf = torch.from_numpy(np.random.RandomState(0).randn(1, 3, 8, 9, 7)).float()
    points = torch.from_numpy(np.random.RandomState(1).uniform(0, 6, (1, 20, 3))).float()
    target = points + 0.5
    spacing = np.array([1.75, 1.25, 1.75])
    moved = np.stack([map_coordinates(c, points[0].numpy().T.astype(float)) for c in ddf[0].numpy().astype(float)], 1)
    expected = np.linalg.norm((points[0].numpy() + moved - target[0].numpy()) * spacing, axis=1).mean()
    value = TargetRegistrationError(spacing, "learn2reg")(points, target, None, ddf)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert abs(float(TargetRegistrationError(spacing)(points, target, None, ddf)) - expected) > 1e-3


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 3\).*\(1, 5, 3\)"):
        TargetRegistrationError()(torch.zeros(1, 4, 3), torch.zeros(1, 5, 3))


SHEARED = torch.tensor([[2.0, 1.0, 40.0], [0.0, 3.0, -7.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def test_a_step_along_a_sheared_axis_is_as_long_as_the_affine_says() -> None:
    points, target = torch.tensor([[[1.0, 1.0], [0.0, 4.0]]]), torch.tensor([[[2.0, 2.0], [0.0, 3.0]]])
    # (-1, -1) becomes (-3, -3) and (0, 1) becomes (1, 3): the axes are 2 and sqrt(10) mm long.
    expected = (math.sqrt(18) + math.sqrt(10)) / 2
    assert float(TargetRegistrationError()(points, target, affine=SHEARED[None])) == pytest.approx(expected)
    assert float(TargetRegistrationError(9.0)(points, target, affine=SHEARED)) == pytest.approx(expected)
    by_length = TargetRegistrationError()(points, target, [2.0, math.sqrt(10)])
    assert float(by_length) == pytest.approx((math.sqrt(14) + math.sqrt(10)) / 2)


@pytest.mark.parametrize("dims", [2, 3])
def test_each_item_has_an_affine_and_a_turned_grid_keeps_lengths(dims: int) -> None:
    turn = torch.eye(dims + 1, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    turn[:-1, -1] = 5.0
    scale = torch.diag(torch.tensor([*[1.5, 2.5, 0.5][:dims], 1.0], dtype=torch.float64))
    generator = torch.Generator().manual_seed(dims)
    points, target = (torch.rand(2, 6, dims, generator=generator) for _ in range(2))
    ddf = torch.randn(2, dims, *(4, 5, 3)[:dims], generator=generator)
    affines = torch.stack([turn @ scale, torch.eye(dims + 1, dtype=torch.float64)])
    found = TargetRegistrationError()(points, target, ddf=ddf, affine=affines)
    spacing = torch.tensor([[1.5, 2.5, 0.5], [1.0, 1.0, 1.0]])[:, :dims]
    torch.testing.assert_close(found, TargetRegistrationError()(points, target, spacing, ddf))
    assert found[0] != found[1]


def test_an_affine_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"affine must be 4 x 4, or 1 of these.*got \(1, 3, 3\)"):
        TargetRegistrationError()(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), affine=SHEARED[None])
