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
"""Chains of affine maps and displacements: what hand and algebra say of them."""

from __future__ import annotations

import pytest
import torch

from common.spatial import Affine, Displacement, Grid, SpatialTransform, compose, integrate, warp_points


def grid(*shape: int, spacing: float = 1.0, origin: float = 0.0) -> Grid:
    affine = torch.diag(torch.tensor([spacing] * len(shape) + [1.0], dtype=torch.float64))
    affine[:-1, -1] = origin
    return Grid(shape, affine)


def smooth_ddf(*shape: int, size: float = 1.0) -> torch.Tensor:
    """A diffeomorphism that leaves the border where it is."""
    position = torch.meshgrid(*[torch.linspace(0, torch.pi, n) for n in shape], indexing="ij")
    bump = torch.stack([p.sin() for p in position]).prod(0)
    return integrate(size * bump * torch.tensor([1.0, -0.5, 0.75][: len(shape)]).view(1, -1, *[1] * len(shape)))


def test_two_millimetres_by_hand() -> None:
    """Voxels of 2 mm whose first lies at 10 mm: a displacement of one voxel is 2 mm, and the affine map adds 5 mm."""
    ddf = torch.zeros(1, 2, 4, 4)
    ddf[:, 0] = 1.0
    shift = torch.eye(3)
    shift[0, 2] = 5.0
    where = grid(4, 4, spacing=2.0, origin=10.0)
    transform = SpatialTransform.from_ddf(ddf, where, where).then(SpatialTransform((Affine(shift),)))
    assert transform.points(torch.tensor([[12.0, 14.0]])).tolist() == [[19.0, 14.0]]
    # On the same grids: (2 + 5) mm are 3.5 voxels; to a moving image that begins at 17 mm, none.
    assert torch.allclose(transform.ddf(where, where)[0, 0], torch.tensor(3.5))
    assert torch.allclose(transform.ddf(where, grid(4, 4, spacing=2.0, origin=17.0))[0, 0], torch.tensor(0.0))


@pytest.mark.parametrize("shape", [(12, 9), (9, 8, 7)])
def test_a_field_goes_through_unlike_grids_and_back(shape: tuple[int, ...]) -> None:
    ddf = smooth_ddf(*shape)
    fixed = grid(*shape, spacing=1.5, origin=-20.0)
    moving = grid(*[n + 3 for n in shape], spacing=0.7, origin=-18.0)
    turn = torch.eye(len(shape) + 1)
    turn[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    for matrix in (None, turn):
        transform = SpatialTransform.from_ddf(ddf, fixed, moving, matrix)
        assert len(transform.parts) == (1 if matrix is None else 2)
        torch.testing.assert_close(transform.ddf(fixed, moving), ddf, atol=1e-4, rtol=0)


def test_points_and_fields_agree(device: torch.device) -> None:
    ddf = smooth_ddf(9, 8, 7).to(device)
    where = grid(9, 8, 7)
    points = torch.rand(1, 20, 3, device=device) * 6
    found = SpatialTransform.from_ddf(ddf, where, where).points(points[0])
    torch.testing.assert_close(found, warp_points(points, ddf)[0].double(), atol=1e-5, rtol=0)


def test_a_chain_of_two_fields_is_their_composition() -> None:
    outer, inner = smooth_ddf(12, 10), smooth_ddf(12, 10, size=-0.7)
    where = grid(12, 10, spacing=2.0, origin=3.0)
    chain = SpatialTransform.from_ddf(inner, where, where).then(SpatialTransform.from_ddf(outer, where, where))
    torch.testing.assert_close(chain.ddf(where, where), compose(outer, inner), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(16, 15), (12, 11, 13)])
def test_there_and_back_is_home(shape: tuple[int, ...]) -> None:
    where = grid(*shape, spacing=1.5)
    zoom = torch.eye(len(shape) + 1)
    zoom[0, 0], zoom[1, 0] = 1.3, 0.2
    transform = SpatialTransform.from_ddf(smooth_ddf(*shape), where, where, zoom)
    inverse, residual = transform.inverse()
    points = torch.rand(30, len(shape), dtype=torch.float64) * (min(shape) - 4) + 2
    home = inverse.points(transform.points(points))
    # At voxels to the tolerance, between them as well as a linear field can.
    assert residual < 2e-3 and float((home - points).abs().max()) < 0.1
    assert type(inverse.parts[0]) is Affine  # the last part is undone first


def test_affine_maps_are_one_map() -> None:
    zoom, shift = torch.diag(torch.tensor([2.0, 2.0, 1.0])), torch.eye(3)
    shift[0, 2] = 1.0
    chain = SpatialTransform((Affine(zoom), Affine(shift)))
    assert chain.matrix is not None and chain.matrix.tolist() == [[2.0, 0.0, 1.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    assert chain.inverse()[1] == 0.0
    assert SpatialTransform.from_ddf(torch.zeros(1, 2, 4, 4), grid(4, 4), grid(4, 4)).matrix is None


def test_what_is_no_transform_is_refused() -> None:
    with pytest.raises(ValueError, match="3x3 matrix"):
        Grid((4, 4), torch.eye(4))
    with pytest.raises(ValueError, match="no inverse"):
        Affine(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\), got \(3, 4, 4\)"):
        Displacement(torch.zeros(3, 4, 4), grid(4, 4))
    with pytest.raises(ValueError, match="one dimension"):
        SpatialTransform((Affine(torch.eye(3)), Affine(torch.eye(4))))
    with pytest.raises(ValueError, match="one dimension"):
        SpatialTransform(())
