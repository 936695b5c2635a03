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
"""A field keeps its physical motion when it moves to other grids."""

from __future__ import annotations

import pytest
import torch

from common.spatial import warp
from common.spatial.world import field_on_grid


def smooth_image(shape: tuple[int, ...]) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in shape], indexing="ij")
    return sum(torch.sin(0.3 * axis + i) for i, axis in enumerate(axes))[None, None]


def test_same_grids_leave_the_field_alone() -> None:
    ddf = torch.randn(1, 3, 7, 8, 9)
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(field_on_grid(ddf, eye, eye, (7, 8, 9), eye, eye), ddf, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3])
def test_cropping_the_padding_away_and_flipping_an_axis_gives_the_same_moved_image(d: int) -> None:
    native = (10, 13, 9)[:d]
    pad_fixed, pad_moving = (3, 2, 4)[:d], (1, 5, 2)[:d]
    padded = tuple(n + 8 for n in native)
    moving = smooth_image(native)
    # Old grid = native grid flipped along axis 0, then padded.
    old_fixed, old_moving = torch.eye(d + 1).double(), torch.eye(d + 1).double()
    for matrix, pad in ((old_fixed, pad_fixed), (old_moving, pad_moving)):
        matrix[0, 0] = -1
        matrix[0, -1] = native[0] - 1 + pad[0]
        for axis in range(1, d):
            matrix[axis, -1] = -pad[axis]
    eye = torch.eye(d + 1).double()
    ddf = 0.4 * torch.randn(1, d, *padded)
    canvas = torch.zeros(1, 1, *padded)
    canvas[(..., *[slice(p, p + n) for p, n in zip(pad_moving, native, strict=True)])] = moving.flip(2)
    expected = warp(canvas, ddf, padding="zeros")
    expected = expected[(..., *[slice(p, p + n) for p, n in zip(pad_fixed, native, strict=True)])].flip(2)
    new = field_on_grid(ddf, old_fixed, old_moving, native, eye, eye)
    assert torch.allclose(warp(moving, new, padding="zeros"), expected, atol=1e-4)


def test_anisotropic_spacing_rescales_the_displacement() -> None:
    ddf = torch.zeros(1, 3, 8, 8, 8)
    ddf[:, 0] = 2.0  # two voxels of 1 mm
    old, new = torch.eye(4).double(), torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.0])).double()
    out = field_on_grid(ddf, old, old, (16, 8, 4), new, new)
    assert torch.allclose(out[:, 0], torch.full_like(out[:, 0], 4.0), atol=1e-5)
    assert torch.allclose(out[:, 1:], torch.zeros_like(out[:, 1:]), atol=1e-5)


def test_a_matrix_of_the_wrong_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="3x3 matrices"):
        field_on_grid(torch.zeros(1, 2, 4, 4), torch.eye(4), torch.eye(3), (4, 4), torch.eye(3), torch.eye(3))
