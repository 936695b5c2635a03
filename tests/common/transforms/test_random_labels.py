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
"""Label maps: the published statistics, without the published lattice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.transforms.perlin import PerlinLattice, isotropic_gradients, perlin
from common.transforms.random_images import PairOptions
from common.transforms.random_labels import random_labels
from common.transforms.random_stream import RandomStream

DEFAULT = PairOptions()


def draw(seeds: list[int], size: tuple[int, ...], num_labels: int = 16) -> Tensor:
    return random_labels(RandomStream(seeds), size, num_labels, DEFAULT.shape_scale, DEFAULT.volume_spread)


def shares(labels: Tensor, num_labels: int = 16) -> Tensor:
    return torch.bincount(labels.flatten().long(), minlength=num_labels + 1)[1:] / labels.numel()


def boundary_share(labels: Tensor) -> float:
    """Share of voxels that differ from the next voxel along any axis."""
    differs = torch.zeros([n - 1 for n in labels.shape], dtype=torch.bool)
    inner = tuple(slice(0, -1) for _ in labels.shape)
    for axis in range(labels.ndim):
        differs |= labels[inner] != labels.roll(-1, axis)[inner]
    return float(differs.float().mean())


def test_published_statistics() -> None:
    maps = draw(list(range(8)), (64, 64, 64))[:, 0]
    share = torch.stack([shares(one) for one in maps])
    entropy = -(share * share.clamp(min=1e-12).log()).sum(1)
    assert (share > 0).sum(1).float().mean() == pytest.approx(15.975, abs=0.4)
    assert float(entropy.mean()) == pytest.approx(2.509, abs=0.08)
    assert float(share.amax(1).mean()) == pytest.approx(0.173, abs=0.035)
    assert sum(boundary_share(one) for one in maps) / 8 == pytest.approx(0.130, abs=0.012)


def winner_share_at_nodes(maps: Tensor, start: int) -> float:
    """Mean share of the commonest label among the voxels at start + 32k on all axes."""
    nodes = maps[..., start::32, start::32, start::32].flatten(1)
    return float(torch.stack([shares(one).max() for one in nodes]).mean())


def test_no_lattice() -> None:
    # The published generator's label maps have one single label at 88.6 % of the places 32k + 8.
    maps = draw(list(range(100, 106)), (96, 96, 96))[:, 0]
    at_nodes = winner_share_at_nodes(maps, 8)
    elsewhere = [winner_share_at_nodes(maps, start) for start in (0, 16, 24)]
    assert at_nodes < 0.4
    assert at_nodes == pytest.approx(sum(elsewhere) / 3, abs=0.08)


def test_the_lattice_measure_sees_a_shared_lattice() -> None:
    # Noise functions on one lattice all vanish at its nodes, where then the largest constant wins.
    g = torch.Generator().manual_seed(0)
    gradients = isotropic_gradients(torch.randn(16, 3, 6, 6, 6, generator=g))
    shift = torch.full((16, 3), 0.75)
    lattice = PerlinLattice(gradients, 0.05 * torch.randn(16, generator=g), torch.full((16, 3), 32.0), shift)
    labels = 1 + perlin(lattice, [torch.arange(96.0)] * 3).argmax(0, keepdim=True)
    assert winner_share_at_nodes(labels, 8) > 0.9


@pytest.mark.parametrize(("size", "num_labels"), [((17, 23, 9), 16), ((31, 45), 5), ((40, 40), 1), ((1, 20, 20), 3)])
def test_any_size(size: tuple[int, ...], num_labels: int, device: torch.device) -> None:
    labels = random_labels(RandomStream([0, 1], device), size, num_labels, (8.0, 8.0))
    assert labels.shape == (2, 1, *size)
    assert labels.dtype == torch.uint8
    assert labels.min() >= 1
    assert labels.max() <= num_labels


def test_more_than_255_labels() -> None:
    labels = random_labels(RandomStream([0]), (32, 32), 400, (2.0, 4.0))
    assert labels.max() > 255
    assert labels.max() <= 400


def test_smaller_cells_make_smaller_shapes() -> None:
    small, large = (random_labels(RandomStream([0]), (64, 64), 8, (s, s))[0, 0] for s in (8.0, 32.0))
    assert boundary_share(small) > 2 * boundary_share(large)
