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
import torch.nn.functional as F
from torch import Tensor

from bundles.similarity_learning.scripts.voxelmorph import PublishedVoxelMorph
from common.losses import MSE
from common.spatial import warp


def _with_motion(spatial_dims: int = 3, strength: float = 2.0) -> PublishedVoxelMorph:
    """A network whose fields are of a few voxels, as no untrained one's are."""
    network = PublishedVoxelMorph(spatial_dims)
    torch.nn.init.normal_(network.head.conv.weight, std=strength)
    return network.eval()


def test_it_has_as_many_parameters_as_the_published_one() -> None:
    assert sum(p.numel() for p in PublishedVoxelMorph().parameters()) == 301_411


def _integrated_by_hand(flow: Tensor, steps: int = 12) -> Tensor:
    """The published head, written with normalised grids: (B, 3, *S) to (B, 3, *S)."""
    field = F.interpolate(flow, scale_factor=0.5, mode="trilinear", align_corners=True) * 0.5 / 2**steps
    axes = [torch.arange(float(n)) for n in field.shape[2:]]
    identity = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    extent = torch.tensor([n - 1.0 for n in field.shape[2:]]).view(3, 1, 1, 1)
    for _ in range(steps):
        grid = (2 * (identity + field) / extent - 1).flip(1).permute(0, 2, 3, 4, 1)
        field = field + F.grid_sample(field, grid, padding_mode="zeros", align_corners=True)
    return F.interpolate(2 * field, scale_factor=2, mode="trilinear", align_corners=True)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 32, 48)])
def test_the_velocity_is_integrated_as_published(size: tuple[int, ...]) -> None:
    with torch.no_grad():
        fields = _with_motion().fields(torch.rand(2, 2, *size))
    assert 0.5 < fields["ddf"].abs().max() < 20
    assert torch.allclose(fields["ddf"], _integrated_by_hand(fields["velocity"]), atol=2e-4)


def test_a_constant_velocity_moves_the_middle_by_itself() -> None:
    network = PublishedVoxelMorph()
    torch.nn.init.zeros_(network.head.conv.weight)
    network.head.conv.bias.data = torch.tensor([1.0, -0.5, 0.25])
    fields = network.fields(torch.rand(1, 2, 32, 32, 32))
    assert torch.equal(fields["half_velocity"][0, :, 0, 0, 0], torch.tensor([0.5, -0.25, 0.125]))
    assert torch.allclose(fields["ddf"][0, :, 16, 16, 16], torch.tensor([1.0, -0.5, 0.25]), atol=1e-5)


@pytest.mark.parametrize("size", [(17, 18, 33), (30, 41)])
def test_any_size_and_every_field(size: tuple[int, ...], device: torch.device) -> None:
    network = _with_motion(len(size)).to(device)
    fields = network.fields(torch.rand(2, 2, *size, device=device))
    assert fields["ddf"].shape == fields["velocity"].shape == (2, len(size), *size)
    assert fields["half_velocity"].shape[2:] == tuple((n + 15) // 16 * 8 for n in size)
    assert torch.equal(network(torch.zeros(1, 2, *size, device=device)).isfinite().all().cpu(), torch.tensor(True))


def test_fields_stay_float32_under_autocast() -> None:
    network, image = _with_motion(), torch.rand(1, 2, 16, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        rounded = network.fields(image)
    exact = network.fields(image)
    assert all(field.dtype == torch.float32 for field in rounded.values())
    assert (rounded["ddf"] - exact["ddf"]).abs().max() < 0.05 * exact["ddf"].abs().max()


def test_it_learns_to_move_one_blob_onto_another(blobs: tuple[Tensor, Tensor]) -> None:
    moving, fixed = blobs
    network = PublishedVoxelMorph(2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(25):
        loss = MSE()(warp(moving, network(torch.cat(blobs, 1))), fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * MSE()(moving, fixed)
