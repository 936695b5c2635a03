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
"""Digital Jacobians, and the volume that folds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.spatial import (
    affine_to_ddf,
    digital_jacobian_determinants,
    jacobian_determinant,
    non_diffeomorphic_volume,
    non_diffeomorphic_volume_percent,
)

SHAPES = [(6, 9), (5, 4, 7)]
COUNT = {2: 4, 3: 10}


def some_matrix(dims: int) -> torch.Tensor:
    matrix = torch.eye(dims + 1).repeat(2, 1, 1)
    matrix[:, :dims] += 0.2 * torch.randn(2, dims, dims + 1)
    return matrix


def one_voxel_pushed(amount: float) -> torch.Tensor:
    """A field on (5, 5) that moves the middle voxel along axis 0."""
    ddf = torch.zeros(1, 2, 5, 5)
    ddf[0, 0, 2, 2] = amount
    return ddf


@pytest.mark.parametrize("shape", SHAPES)
def test_digital_determinants_of_an_affine_field(shape, device):
    """All equal its determinant; the two central tetrahedra of 3-D, being twice as large, twice that."""
    matrix = some_matrix(len(shape)).to(device)
    found = digital_jacobian_determinants(affine_to_ddf(matrix, shape))
    assert found.shape == (2, COUNT[len(shape)], *(n - 2 for n in shape))
    size = torch.tensor([1.0] * 2 ** len(shape) + [2.0] * (len(shape) == 3) * 2, device=device)
    expected = torch.linalg.det(matrix[:, :-1, :-1]).unsqueeze(1) * size
    torch.testing.assert_close(found, expected.view(2, -1, *(1,) * len(shape)).expand_as(found), atol=1e-5, rtol=0)


def test_digital_determinants_see_what_central_differences_miss():
    """Every second voxel jumps over its neighbour: central differences see the identity, one-sided ones a fold."""
    ddf = torch.zeros(1, 2, 7, 7)
    ddf[0, 0, ::2] = 1.5
    inside = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(jacobian_determinant(ddf)[inside], torch.ones(1, 5, 5))
    assert (digital_jacobian_determinants(ddf).amin(1) < 0).all()
    assert non_diffeomorphic_volume(ddf).item() > 0


def test_order_of_the_combinations():
    """Forward first, the last axis fastest: only combinations with a backward difference on axis 0 see row 1 move."""
    ddf = torch.zeros(1, 2, 3, 3)
    ddf[0, 0, 0, 1] = -1.0
    assert digital_jacobian_determinants(ddf).flatten().tolist() == [1, 1, 2, 2]


def test_folded_area_by_hand():
    """The middle voxel pushed by 3 overtakes its neighbour (at 1): its two forward triangles have 1 - 3 = -2 each.

    Backward triangles grow to 4. The voxel ahead sees its backward differences shrink by 3: again two of -2. In the
    rows beside it, differences along axis 1 tilt, which changes no area. The determinants sum to -8, triangles are half
    of that, and they tile the plane twice: 2.
    """
    ddf = one_voxel_pushed(3.0)
    folded = digital_jacobian_determinants(ddf).clamp(max=0).neg()
    assert folded[0, :, 1, 1].tolist() == [2, 2, 0, 0]
    assert folded[0, :, 2, 1].tolist() == [0, 0, 2, 2]
    assert folded.sum() == 8
    assert non_diffeomorphic_volume(ddf).tolist() == [2.0]
    torch.testing.assert_close(non_diffeomorphic_volume_percent(ddf), torch.tensor([100 * 2 / 9]))
    assert non_diffeomorphic_volume(one_voxel_pushed(0.9)).item() == 0


@pytest.mark.parametrize("channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_mask(channel, dtype):
    """Only the masked voxel's two triangles count: 2 * 2 / 4 = 1 of 1 voxel. The mask's border is never counted."""
    mask = torch.zeros(1, 5, 5, dtype=dtype)
    mask[0, 2, 2] = 1
    mask[0, 0] = 1
    mask = mask.unsqueeze(1) if channel else mask
    assert non_diffeomorphic_volume(one_voxel_pushed(3.0), mask).tolist() == [1.0]
    assert non_diffeomorphic_volume_percent(one_voxel_pushed(3.0), mask).tolist() == [100.0]


def test_an_empty_mask_has_no_percentage():
    assert non_diffeomorphic_volume_percent(one_voxel_pushed(3.0), torch.zeros(1, 1, 5, 5)).isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_and_reflection(shape, device):
    """Nothing folds; everything folds, once."""
    ddf = torch.zeros(1, len(shape), *shape, device=device)
    assert non_diffeomorphic_volume_percent(ddf).tolist() == [0.0]
    matrix = torch.eye(len(shape) + 1, device=device)
    matrix[0, 0], matrix[0, -1] = -1, shape[0] - 1
    ddf = affine_to_ddf(matrix, shape)
    torch.testing.assert_close(non_diffeomorphic_volume_percent(ddf), torch.tensor([100.0], device=device))
    assert (jacobian_determinant(ddf) < 0).all()


@pytest.mark.parametrize("function", [digital_jacobian_determinants, non_diffeomorphic_volume])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 4)])
def test_gradients_in_float64(function, shape):
    ddf = torch.randn(1, len(shape), *shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (ddf,))


def test_fields_are_raised_to_float32(device):
    """bfloat16 knows 8 bits: what is computed from it must not lose more."""
    ddf = torch.randn(1, 3, 6, 6, 6, device=device).bfloat16()
    for function in (digital_jacobian_determinants, non_diffeomorphic_volume):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found = function(ddf)
        assert found.dtype == torch.float32
        assert torch.equal(found, function(ddf.float()))


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 9\)"):
        digital_jacobian_determinants(torch.zeros(1, 2, 2, 9))
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\) for ddf \(1, 2, 5, 5\)"):
        non_diffeomorphic_volume(torch.zeros(1, 2, 5, 5), torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 5\)"):
        jacobian_determinant(torch.zeros(1, 3, 5, 5))


@pytest.mark.parametrize("amplitude", ["0.5", "1.0", "2.0", "3.0"])
def test_parity_with_published_evaluations(shared, amplitude):
    """NDV, its voxels and tetrahedra, SDlogJ and central folding of a field of sines."""
    figures = json.loads((shared / "parity" / "dual_stream_pyramid" / "small_refs.json").read_text())
    expected = figures["metrics_field_24x30x26"][amplitude]
    i, j, k = np.meshgrid(*[np.arange(n, dtype=float) for n in (24, 30, 26)], indexing="ij")
    turn = 2 * np.pi
    waves = [np.sin(turn * j / 11) * np.cos(turn * k / 9), np.cos(turn * i / 10 + 0.3), np.sin(turn * (i + j) / 13)]
    ddf = float(amplitude) * torch.tensor(np.stack(waves))[None]
    determinants = digital_jacobian_determinants(ddf)
    assert non_diffeomorphic_volume_percent(ddf).item() == pytest.approx(expected["ndv_percent"], rel=1e-6)
    assert non_diffeomorphic_volume_percent(ddf.float()).item() == pytest.approx(expected["ndv_percent"], rel=1e-5)
    assert non_diffeomorphic_volume(ddf).item() == pytest.approx(expected["ndv_sum_sitreg"], rel=1e-6)
    assert (determinants <= 0).sum().item() == pytest.approx(10 * expected["nd_tetra"])
    central = jacobian_determinant(ddf)[0, 2:-2, 2:-2, 2:-2]
    assert central.min().item() == pytest.approx(expected["jmin"], rel=1e-6)
    assert 100 * (central <= 0).double().mean().item() == pytest.approx(expected["folding_pct_central"])
    spread = (central + 3).clip(1e-9, 1e9).log().std(correction=0).item()
    assert spread == pytest.approx(expected["sdlogj_l2r"], rel=1e-5)


def test_parity_of_rough_fields(shared):
    """NDV and non-positive central determinants of noise."""
    assert shared
    random = np.random.RandomState(0)
    random.rand(2, 20, 24, 28)
    flow = torch.tensor((2 * random.standard_normal((1, 3, 20, 24, 28))).astype(np.float32))
    assert non_diffeomorphic_volume_percent(0.25 * flow).item() == pytest.approx(14.438816, rel=1e-5)
    assert non_diffeomorphic_volume_percent(flow).item() == pytest.approx(1136.475424, rel=1e-5)
    central = jacobian_determinant(0.25 * flow)[:, 1:-1, 1:-1, 1:-1]
    assert 100 * (central <= 0).double().mean().item() == pytest.approx(2.622378, rel=1e-5)
