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
"""Jacobians by central differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.spatial import affine_to_ddf, jacobian_determinant, jacobian_matrix

SHAPES = [(6, 9), (5, 4, 7)]


def some_matrix(dims: int) -> torch.Tensor:
    matrix = torch.eye(dims + 1).repeat(2, 1, 1)
    matrix[:, :dims] += 0.2 * torch.randn(2, dims, dims + 1)
    return matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_affine_field_has_its_matrix_everywhere(shape, device):
    """At the border too, where differences are one-sided."""
    matrix = some_matrix(len(shape)).to(device)
    linear = matrix[:, :-1, :-1]
    ddf = affine_to_ddf(matrix, shape)
    expected = linear.view(2, *linear.shape[1:], *(1,) * len(shape)).expand(-1, -1, -1, *shape)
    torch.testing.assert_close(jacobian_matrix(ddf), expected, atol=1e-5, rtol=0)
    determinants = torch.linalg.det(linear).view(2, *(1,) * len(shape)).expand(2, *shape)
    torch.testing.assert_close(jacobian_determinant(ddf), determinants, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_numpy_gradient(shape):
    """numpy's first-order gradient makes the same choices at the border."""
    ddf = torch.randn(1, len(shape), *shape, dtype=torch.float64)
    matrix = np.stack([np.stack(np.gradient(component)) for component in ddf[0].numpy()])
    matrix += np.eye(len(shape)).reshape(len(shape), len(shape), *(1,) * len(shape))
    np.testing.assert_allclose(jacobian_matrix(ddf)[0].numpy(), matrix, atol=1e-12)
    expected = np.linalg.det(np.moveaxis(matrix, (0, 1), (-2, -1)))
    np.testing.assert_allclose(jacobian_determinant(ddf)[0].numpy(), expected, atol=1e-12)


def test_short_axes():
    """Two voxels have one difference; one has none, and counts as unmoved."""
    ddf = torch.zeros(1, 2, 2, 1)
    ddf[0, 0, 1] = 0.5
    torch.testing.assert_close(jacobian_determinant(ddf), torch.full((1, 2, 1), 1.5))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 4)])
def test_gradients_in_float64(shape):
    ddf = torch.randn(1, len(shape), *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(jacobian_determinant, (ddf,))


def test_fields_are_raised_to_float32(device):
    """bfloat16 knows 8 bits: what is computed from it must not lose more."""
    ddf = torch.randn(1, 3, 6, 6, 6, device=device).bfloat16()
    for function in (jacobian_determinant, jacobian_matrix):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = function(ddf)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(ddf.float()))


def test_errors_name_the_shape():
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 5\)"):
        jacobian_determinant(torch.zeros(1, 3, 5, 5))
