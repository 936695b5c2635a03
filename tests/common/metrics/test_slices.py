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

import pytest
import torch

from common.metrics import (
    AverageSurfaceDistance,
    HausdorffDistance,
    MeanJacobian,
    NonPositiveJacobianPercent,
    PerSlice,
)


def stacks() -> tuple[torch.Tensor, torch.Tensor]:
    """A square of 6 x 6 that is shifted by z voxels in slice z, and missing from slice 3 of the second map."""
    a = torch.zeros(2, 1, 24, 24, 4, dtype=torch.int32)
    b = a.clone()
    for z in range(4):
        a[:, 0, 8:14, 8:14, z] = 1
        b[:, 0, 8 + z : 14 + z, 8:14, z] = int(z < 3)
    return a, b


def test_distances_are_averaged_over_the_slices_that_have_the_structure() -> None:
    moved, fixed = stacks()
    spacing = torch.tensor([[2.0, 1.0, 10.0], [3.0, 1.0, 10.0]])
    hd = PerSlice(HausdorffDistance([1, 2]))(moved_label=moved, fixed_label=fixed, spacing=spacing)
    # 0, 1 and 2 voxels along the first axis: 1 on average.
    assert hd[:, 0].tolist() == [2.0, 3.0] and bool(hd[:, 1].isnan().all())
    plain = PerSlice(HausdorffDistance([1]))(moved, fixed)
    assert plain.tolist() == [[1.0], [1.0]]
    one_by_one = [AverageSurfaceDistance([1])(moved[..., z], fixed[..., z])[0, 0] for z in range(3)]
    asd = PerSlice(AverageSurfaceDistance([1]))
    assert float(asd(moved, fixed)[0, 0]) == pytest.approx(float(sum(one_by_one)) / 3)
    assert asd.columns == ("1",)


def test_fields_are_measured_in_plane() -> None:
    x = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(1, 1, 9, 8, 2)
    ddf = torch.cat([0.5 * x, torch.zeros(1, 2, 9, 8, 2)], 1)
    ddf[..., 1] *= -3.0  # a determinant of 1.5 in one slice, of -0.5 in the other
    assert PerSlice(MeanJacobian(), field=True)(ddf).item() == pytest.approx(0.5)
    assert PerSlice(NonPositiveJacobianPercent(), field=True)(ddf).item() == pytest.approx(50.0)


def test_a_field_that_leaves_its_slice_is_refused() -> None:
    with pytest.raises(ValueError, match="none along the last axis, got 3 components and up to 1 voxels"):
        PerSlice(MeanJacobian(), field=True)(torch.ones(1, 3, 5, 5, 2))
    with pytest.raises(ValueError, match="got 2 components"):
        PerSlice(MeanJacobian(), field=True)(torch.zeros(1, 2, 5, 5, 2))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mean_jacobian_of_a_stretch(dims: int) -> None:
    axes = torch.meshgrid(*[torch.arange(7.0)] * dims, indexing="ij")
    ddf = 0.5 * torch.stack(axes)[None]
    assert MeanJacobian()(ddf).item() == pytest.approx(1.5**dims)
    mask = torch.zeros(1, 1, *[7] * dims)
    mask[:, :, 3] = 1
    assert MeanJacobian()(ddf, mask).item() == pytest.approx(1.5**dims)


def test_monai_has_the_same_largest_surface_distance() -> None:
    from monai.metrics import compute_hausdorff_distance

    moved, fixed = (torch.zeros(1, 1, 20, 22, 18, dtype=torch.int32) for _ in range(2))
    moved[:, :, 4:13, 5:14, 3:9] = 1
    fixed[:, :, 5:16, 6:12, 6:13] = 1
    spacing = (1.5, 2.0, 0.7)
    expected = compute_hausdorff_distance(moved.float(), fixed.float(), include_background=True, spacing=spacing)
    found = HausdorffDistance([1], spacing)(moved, fixed)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5) and not math.isnan(found.item())
