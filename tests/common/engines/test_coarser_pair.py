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

from common.engines.coarser_pair import coarser_field, coarser_values
from common.spatial import identity_grid, warp


def test_averages_over_blocks() -> None:
    image = torch.arange(20.0).view(1, 1, 4, 5)
    # The last block has one column, and counts it twice.
    assert coarser_values({"moving": image}, [2, 2])["moving"].tolist() == [[[[3.0, 5.0, 6.5], [13.0, 15.0, 16.5]]]]
    assert coarser_values({"moving": image}, [4, 1])["moving"].tolist() == [[[[7.5, 8.5, 9.5, 10.5, 11.5]]]]


@pytest.mark.parametrize(("size", "voxels"), [((8, 6), [2, 2]), ((6, 4, 5), [2, 2, 1])])
def test_a_linear_field_leads_to_the_same_places(size: tuple[int, ...], voxels: list[int]) -> None:
    dims = len(size)
    linear = torch.randn(dims, dims) / 5
    factors = torch.tensor(voxels, dtype=torch.float32)
    shape = (1, -1, *(1,) * dims)
    ddf = torch.einsum("cd,d...->c...", linear, identity_grid(size))[None]
    found = coarser_field(ddf, voxels)
    blocks = [n // f for n, f in zip(size, voxels, strict=True)]
    places = identity_grid(blocks)[None] * factors.view(shape) + ((factors - 1) / 2).view(shape)
    torch.testing.assert_close(found * factors.view(shape), torch.einsum("cd,bd...->bc...", linear, places))


def test_moving_and_averaging_commute() -> None:
    x, y = identity_grid((40, 41))
    image = (torch.sin(x / 6) * torch.cos(y / 7))[None, None]
    ddf = torch.stack([2 * torch.sin(y / 9), 1.5 * torch.cos(x / 8)])[None]

    def coarse(values: Tensor) -> Tensor:
        return coarser_values({"image": values}, [2, 2])["image"]

    moved = warp(coarse(image), coarser_field(ddf, [2, 2]))
    inner = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(moved[inner], coarse(warp(image, ddf))[inner], rtol=0, atol=0.02)


def test_a_mask_hides_what_is_in_its_blocks() -> None:
    image, mask = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    image[..., 3:, :] = float("nan")
    image[..., 0] = 7
    mask[..., 3:, :] = 0
    found = coarser_values({"fixed": image, "fixed_mask": mask, "moving": image}, [2, 2])
    assert found["fixed"].tolist() == [[[[4.0, 1.0], [4.0, 1.0]]]]
    assert found["fixed_mask"].tolist() == [[[[1.0, 1.0], [0.5, 0.5]]]]
    assert found["moving"][0, 0, 1].isnan().all()  # the mask of the other image has no say
    mask[..., 2, :] = 0
    image[..., 2:, :] = 5
    hidden = coarser_values({"fixed": image, "fixed_mask": mask}, [2, 2])["fixed"]
    assert hidden.tolist() == [[[[4.0, 1.0], [5.0, 5.0]]]]  # where nothing is to be seen any number will do


@pytest.mark.parametrize("axes", [2, 3])
def test_blocks_lie_where_their_voxels_do(axes: int) -> None:
    # A stack's affine has an axis more than its slices.
    affine = torch.eye(axes + 1, dtype=torch.float64)
    affine[:-1] += torch.randn(axes, axes + 1, dtype=torch.float64) / 3
    found = coarser_values({"fixed_affine": affine[None]}, [2, 1])["fixed_affine"][0]
    block = torch.tensor([3.0, 5.0, 2.0][:axes] + [1.0], dtype=torch.float64)
    middle = torch.tensor([6.5, 5.0, 2.0][:axes] + [1.0], dtype=torch.float64)
    torch.testing.assert_close(found @ block, affine @ middle)


def test_what_is_no_image_stays() -> None:
    values = {"alpha": torch.ones(1, 3), "sigma": 2.0, "w": [torch.ones(1, 1, 4, 4)]}
    assert coarser_values(values, [2, 2]) == values
