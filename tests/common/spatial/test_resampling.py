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
"""Fields on finer and coarser grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.spatial import affine_to_ddf, resample_field

SIZES = [((6, 9), (11, 17)), ((5, 6, 7), (10, 12, 14)), ((9, 8, 7), (5, 4, 3))]


def grid_change(old: tuple[int, ...], new: tuple[int, ...], align_corners: bool) -> torch.Tensor:
    """The matrix from new to old voxel coordinates, from the definition of each convention."""
    matrix = torch.eye(len(old) + 1, dtype=torch.float64)
    for axis, (o, n) in enumerate(zip(old, new, strict=True)):
        if align_corners:
            matrix[axis, axis] = (o - 1) / (n - 1)
        else:
            matrix[axis, axis] = o / n
            matrix[axis, -1] = 0.5 * o / n - 0.5
    return matrix


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_an_affine_motion_stays_the_same_motion(old, new, align_corners, device):
    """Change the grid, move, change back: T^-1 A T as a field is what resampling gives, wherever it interpolates."""
    dims = len(old)
    matrix = torch.eye(dims + 1, dtype=torch.float64)
    matrix[:dims] += 0.1 * torch.randn(dims, dims + 1, dtype=torch.float64)
    change = grid_change(old, new, align_corners)
    expected = affine_to_ddf(torch.linalg.inv(change) @ matrix @ change, new).to(device)
    found = resample_field(affine_to_ddf(matrix, old).to(device), new, align_corners=align_corners)
    margin = 0 if align_corners else max(1, max(n // o for o, n in zip(old, new, strict=True)))
    window = (..., *(slice(margin, n - margin) for n in new))
    torch.testing.assert_close(found[window], expected[window])


@pytest.mark.parametrize("align_corners", [True, False])
def test_a_translation_keeps_its_share_of_the_field_of_view(align_corners):
    """3 of 12 voxels are 6 of 24 by faces; 3 of 11 steps are 69/11 of 23 steps by centres."""
    ddf = torch.full((1, 2, 12, 12), 3.0)
    found = resample_field(ddf, (24, 12), align_corners=align_corners)
    torch.testing.assert_close(found[:, 0], torch.full((1, 24, 12), 3 * 23 / 11 if align_corners else 6.0))
    torch.testing.assert_close(found[:, 1], torch.full((1, 24, 12), 3.0))


@pytest.mark.parametrize("align_corners", [True, False])
def test_there_and_back_again(align_corners, smooth_field):
    """A smooth field survives a finer grid; by centres exactly, when the old centres are among the new."""
    ddf = smooth_field((9, 13), 2.0)
    finer = resample_field(ddf, (17, 25), align_corners=align_corners)
    back = resample_field(finer, (9, 13), align_corners=align_corners)
    if align_corners:
        torch.testing.assert_close(back, ddf, atol=1e-5, rtol=0)
    assert (back - ddf).abs().mean() < 0.1 * ddf.abs().mean()


def test_same_size_is_the_same_field(smooth_field):
    ddf = smooth_field((6, 7), 1.0)
    for align_corners in (True, False):
        assert torch.equal(resample_field(ddf, (6, 7), align_corners=align_corners), ddf)


@pytest.mark.parametrize("align_corners", [True, False])
def test_axes_of_one_voxel(align_corners):
    found = resample_field(torch.ones(1, 3, 1, 4, 4), (1, 8, 8), align_corners=align_corners)
    assert found.isfinite().all() and (found[:, 0] == 1).all()
    assert resample_field(torch.ones(1, 3, 1, 4, 4), (2, 4, 1), align_corners=align_corners).isfinite().all()


def test_half_precision_and_gradient(device):
    ddf = torch.randn(1, 2, 5, 6, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = resample_field(ddf.bfloat16(), (9, 9), align_corners=True)
    assert found.dtype == torch.float32
    assert torch.equal(found, resample_field(ddf.bfloat16().float(), (9, 9), align_corners=True))
    exact = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: resample_field(u, (5, 3), align_corners=False), (exact,))


def test_errors():
    ddf = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\), got \(8, 8, 8\)"):
        resample_field(ddf, (8, 8, 8), align_corners=True)
    with pytest.raises(ValueError, match=r"got \(0, 8\)"):
        resample_field(ddf, (0, 8), align_corners=True)
    with pytest.raises(ValueError, match="scale"):
        resample_field(ddf, (8, 8), align_corners=True, scale=[2.0])


def test_parity_with_a_published_doubling(shared):
    """Published networks double the values, although centres that coincide would want (2n - 1) / (n - 1)."""
    arrays = np.load(shared / "parity" / "dual_stream_pyramid" / "resize_flow.npz")
    found = resample_field(torch.tensor(arrays["inp"]), arrays["out"].shape[2:], align_corners=True, scale=2)
    torch.testing.assert_close(found, torch.tensor(arrays["out"]), atol=1e-6, rtol=0)
