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
"""Coordinates, and what every function checks of its inputs."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from common.spatial import identity_grid
from common.spatial.grid import as_field, plain


def test_identity_grid():
    grid = identity_grid((2, 3))
    assert grid.tolist() == [[[0, 0, 0], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]]]
    assert grid.dtype == torch.float32
    assert identity_grid((2, 3, 4), dtype=torch.float64)[:, 1, 2, 3].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int16, torch.float32),
    ],
)
def test_fields_are_at_least_float32(given, kept):
    assert as_field(torch.zeros(1, 2, 3, 3, dtype=given)).dtype == kept


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 3, 3, 3), (1, 2, 3, 3, 3), (1, 1, 5), (1, 4, 2, 2, 2, 2)])
def test_what_is_no_field_is_refused(shape):
    with pytest.raises(ValueError, match="velocity must be") as caught:
        as_field(torch.zeros(shape), "velocity")
    assert str(shape) in str(caught.value)


def test_plain_drops_the_subclass_and_keeps_the_gradient():
    given = MetaTensor(torch.ones(2)).requires_grad_()
    found = plain(given)
    assert type(found) is torch.Tensor
    found.sum().backward()
    assert given.grad is not None and given.grad.tolist() == [1, 1]
