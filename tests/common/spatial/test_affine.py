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
"""Affine maps as fields and back."""

from __future__ import annotations

import pytest
import torch

from common.spatial import affine_to_ddf, ddf_to_affine, identity_grid, warp_points

SHAPES = [(6, 9), (5, 4, 7)]


def some_matrix(dims: int, batch: int = 2) -> torch.Tensor:
    matrix = torch.eye(dims + 1).repeat(batch, 1, 1)
    matrix[:, :dims] += 0.2 * torch.randn(batch, dims, dims + 1)
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_points_land_where_the_matrix_says(shape, device):
    matrix = some_matrix(len(shape)).to(device)
    points = torch.rand(2, 5, len(shape), device=device) * (torch.tensor(shape, device=device) - 1)
    expected = points @ matrix[:, :-1, :-1].transpose(1, 2) + matrix[:, :-1, -1].unsqueeze(1)
    torch.testing.assert_close(warp_points(points, affine_to_ddf(matrix, shape)), expected, atol=1e-4, rtol=0)


def test_a_rotation_by_hand():
    """A quarter turn sends (1, 0) to (0, 1): displacement (-1, 1)."""
    matrix = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    ddf = affine_to_ddf(matrix, (3, 3))
    assert ddf.shape == (1, 2, 3, 3)
    assert ddf[0, :, 1, 0].tolist() == [-1, 1]
    assert ddf[0, :, 0, 2].tolist() == [-2, -2]


@pytest.mark.parametrize("shape", SHAPES)
def test_fit_returns_the_matrix(shape, device):
    matrix = some_matrix(len(shape)).to(device)
    torch.testing.assert_close(ddf_to_affine(affine_to_ddf(matrix, shape)), matrix, atol=1e-5, rtol=0)


def test_fit_is_the_least_squares_one():
    ddf = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    grid = identity_grid((5, 6), dtype=torch.float64).flatten(1)
    design = torch.cat([grid, torch.ones(1, 30, dtype=torch.float64)]).T
    solution = torch.linalg.lstsq(design, (ddf[0].flatten(1) + grid).T).solution.T
    torch.testing.assert_close(ddf_to_affine(ddf)[0, :2], solution)


@pytest.mark.parametrize("channel", [True, False])
def test_fit_looks_inside_the_mask_only(channel):
    matrix = some_matrix(2)
    ddf = affine_to_ddf(matrix, (8, 8))
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 3:7] = True
    ddf = torch.where(mask.unsqueeze(1), ddf, torch.full_like(ddf, 50.0))
    found = ddf_to_affine(ddf, mask.unsqueeze(1) if channel else mask)
    torch.testing.assert_close(found, matrix, atol=1e-4, rtol=0)
    assert (ddf_to_affine(ddf) - matrix).abs().max() > 1


def test_fit_along_an_axis_of_one_voxel_is_finite():
    ddf = torch.zeros(1, 3, 1, 5, 5)
    ddf[:, 0] = 2
    found = ddf_to_affine(ddf)
    torch.testing.assert_close(affine_to_ddf(found, (1, 5, 5)), ddf)
    assert torch.equal(ddf_to_affine(ddf, torch.zeros(1, 1, 1, 5, 5)).isfinite(), torch.ones(1, 4, 4, dtype=torch.bool))


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(4, 4, 4\), got \(1, 3, 3\)"):
        affine_to_ddf(torch.eye(3), (4, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\) for ddf \(1, 2, 4, 4\)"):
        ddf_to_affine(torch.zeros(1, 2, 4, 4), torch.ones(1, 1, 3, 3))


def test_autocast_keeps_the_digits(device):
    matrix = some_matrix(3).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ddf = affine_to_ddf(matrix, (6, 6, 6))
        found = ddf_to_affine(ddf)
    assert ddf.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, matrix, atol=1e-4, rtol=0)


def test_gradient_reaches_the_matrix():
    matrix = some_matrix(2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: affine_to_ddf(m, (3, 4)), (matrix,))
    assert torch.autograd.gradcheck(lambda m: ddf_to_affine(affine_to_ddf(m, (3, 4))), (matrix,))
