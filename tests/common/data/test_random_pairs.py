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
from torch.utils.data import DataLoader

from common.data import RandomPairDataset
from common.spatial import warp
from common.transforms import RandImagePair

SIZE = (18, 16)


def dataset(seed: int = 0, **options: bool) -> RandomPairDataset:
    return RandomPairDataset(RandImagePair(SIZE), length=3, seed=seed, **options)


def test_a_pair_follows_from_seed_epoch_and_index() -> None:
    one, other = dataset(), dataset()
    assert torch.equal(one[2]["moving"], other[2]["moving"]), "no matter what was drawn before"
    seen = [one[0]["moving_id"], one[1]["moving_id"], dataset(seed=1)[0]["moving_id"]]
    one.set_epoch(1)
    seen += [one[0]["moving_id"], dataset(renew=False)[0]["moving_id"]]
    assert len(set(seen)) == 5


def test_validation_pairs_stay() -> None:
    fixed = dataset(renew=False)
    first = fixed[1]
    fixed.set_epoch(5)
    assert torch.equal(first["fixed"], fixed[1]["fixed"])


def test_the_true_field_leads_from_fixed_to_moving() -> None:
    pair = dataset()[0]
    assert "ddf" not in pair
    moved = warp(pair["moving"][None], pair["true_ddf"][None])[0]
    before, after = ((image - pair["fixed"]).abs().mean() for image in (pair["moving"], moved))
    assert after < 0.5 * before


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_sees_each_epoch(workers: int) -> None:
    data = dataset()
    loader = DataLoader(data, batch_size=3, num_workers=workers, persistent_workers=workers > 0)
    ids = []
    for epoch in (1, 2):
        data.set_epoch(epoch)
        ids += [name for batch in loader for name in batch["moving_id"]]
    assert len(set(ids)) == 6


def test_bounds() -> None:
    assert len(dataset()) == len(list(dataset())) == 3
    with pytest.raises(ValueError, match="at least 1, got 0"):
        RandomPairDataset(RandImagePair(SIZE), length=0)
