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
"""Random deformations: amplitudes, folds, exactness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.spatial import (
    compose,
    digital_jacobian_determinants,
    integrate,
    jacobian_determinant,
    resample_field,
)
from common.transforms.random_fields import random_pair_fields, random_velocities, smallest_determinant
from common.transforms.random_stream import RandomStream


def rms_length(ddf: Tensor) -> float:
    return float(ddf.square().sum(1).mean().sqrt())


# Published generator at 64^3, 40 seeds; ours is free of folds, which takes a little of the largest.
@pytest.mark.parametrize(("amplitude", "published"), [(4.0, 1.25), (8.0, 2.45), (14.0, 4.22), (18.0, 5.63)])
def test_published_amplitudes(amplitude: float, published: float) -> None:
    ddf, moving = random_pair_fields(RandomStream(list(range(6))), (64, 64, 64), [amplitude], 32.0)
    mean = (rms_length(moving) + rms_length(compose(moving, ddf))) / 2
    assert mean == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize("amplitude", [18.0, 40.0, 1000.0])
def test_no_folds_at_any_amplitude(amplitude: float) -> None:
    ddf, moving = random_pair_fields(RandomStream([0, 1, 2]), (48, 40, 44), [amplitude], 24.0)
    assert rms_length(ddf) > 2.0
    for field in (ddf, moving):
        assert float(jacobian_determinant(field).min()) > 0
        assert float(digital_jacobian_determinants(field).min()) > 0


def test_no_folds_in_2d() -> None:
    ddf, moving = random_pair_fields(RandomStream(list(range(8))), (96, 80), [18.0, 60.0], 32.0)
    assert float(jacobian_determinant(ddf).min()) > 0
    assert float(jacobian_determinant(moving).min()) > 0


def test_answer_agrees_with_integrated_velocities() -> None:
    """compose(moving, ddf), the fixed image's view by definition, is close to the exponential of its velocity."""
    size = (64, 64)
    velocity = random_velocities(RandomStream([3]), size, [12.0], 32.0)
    by_velocity = resample_field(integrate(velocity[:, 1], 9), size, align_corners=True)
    ddf, moving = random_pair_fields(RandomStream([3]), size, [12.0], 32.0)
    inner = (..., slice(12, -12), slice(12, -12))  # at the border velocities are continued differently
    difference = (compose(moving, ddf) - by_velocity)[inner].abs()
    assert rms_length(by_velocity) > 2.0
    assert float(difference.mean()) < 0.15
    assert float(difference.max()) < 1.0


def test_amplitude_zero_stands_still() -> None:
    ddf, moving = random_pair_fields(RandomStream([0]), (20, 24, 16), [0.0], 8.0)
    assert not bool(ddf.any())
    assert not bool(moving.any())


def test_an_axis_of_one_voxel_stands_still() -> None:
    ddf, _ = random_pair_fields(RandomStream([0]), (1, 24, 16), [4.0], 8.0)
    assert not bool(ddf[:, 0].any())
    assert bool(ddf[:, 1].any())


def test_velocities_are_isotropic() -> None:
    velocity = random_velocities(RandomStream(list(range(60))), (33, 33, 33), [4.0], 16.0)
    power = velocity.square().mean((0, 1, 3, 4, 5))
    assert float(power.max() / power.min()) < 1.2


def test_smallest_determinant_by_hand() -> None:
    ddf = torch.zeros(2, 2, 4, 5)
    ddf[0, 0] = 0.5 * torch.arange(4).view(-1, 1)  # stretches axis 0 by 1.5
    ddf[1, 1, 2, 3] = -1.25  # one voxel jumps behind its neighbour
    assert smallest_determinant(ddf).tolist() == pytest.approx([1.5, -0.25])


def test_smallest_determinant_sees_a_checkerboard() -> None:
    ddf = torch.zeros(1, 3, 8, 8, 8)
    ddf[:, 0, ::2] = 0.6
    ddf[:, 0, 1::2] = -0.6
    assert float(jacobian_determinant(ddf)[..., 1:-1, 1:-1, 1:-1].min()) == pytest.approx(1.0, abs=1e-5)
    assert float(smallest_determinant(ddf)) == pytest.approx(-0.2, abs=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_smallest_determinant_of_an_affine_map(dims: int) -> None:
    g = torch.Generator().manual_seed(dims)
    matrix = 0.3 * torch.randn(dims, dims, generator=g)
    grid = torch.stack(torch.meshgrid(*[torch.arange(5.0)] * dims, indexing="ij"))
    ddf = torch.einsum("ij,j...->i...", matrix, grid).unsqueeze(0)
    assert float(smallest_determinant(ddf)) == pytest.approx(
        float(torch.linalg.det(torch.eye(dims) + matrix)), abs=1e-4
    )
