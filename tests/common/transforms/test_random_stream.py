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
"""Random numbers of batches."""

from __future__ import annotations

import pytest
import torch

from common.transforms.random_stream import RandomStream, item_seeds


def draw(seeds: list[int]) -> list[torch.Tensor]:
    stream = RandomStream(seeds)
    return [
        stream.uniform(3, low=2.0, high=5.0),
        stream.normal(2, 2),
        stream.choice([4.0, 6.0], 5),
        stream.chance(0.5, 4),
        stream.voxel_noise(1, 3),
    ]


def test_an_item_does_not_depend_on_its_neighbours() -> None:
    for alone, together in zip(draw([7]), draw([1, 7]), strict=True):
        assert torch.equal(alone[0], together[1])


def test_ranges() -> None:
    uniform, _, choice, chance, _ = draw(list(range(50)))
    assert uniform.min() >= 2.0
    assert uniform.max() < 5.0
    assert set(choice.flatten().tolist()) == {4.0, 6.0}
    assert 0.3 < chance.float().mean() < 0.7
    stream = RandomStream([0])
    assert bool(stream.chance(1.0, 100).all())
    assert not bool(stream.chance(0.0, 100).any())


def test_voxel_noise_leaves_the_tables_alone() -> None:
    one, two = RandomStream([3]), RandomStream([3])
    one.voxel_noise(10)
    assert torch.equal(one.normal(4), two.normal(4))


def test_seeds() -> None:
    assert item_seeds(3, 5, None) == (5, 6, 7)
    assert item_seeds(2, [9, 4], None) == (9, 4)
    first = item_seeds(2, None, torch.Generator().manual_seed(0))
    assert first == item_seeds(2, None, torch.Generator().manual_seed(0))
    assert len(set(first)) == 2


def test_contradicting_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        item_seeds(1, 0, torch.Generator())
    with pytest.raises(ValueError, match=r"2 seeds .* batch of 3"):
        item_seeds(3, [1, 2], None)
