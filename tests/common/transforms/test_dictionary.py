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
"""The dictionary transform and its place in MONAI."""

from __future__ import annotations

import pickle

import monai.transforms
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

import common.transforms
from common.transforms import RandImagePair, RandImagePairD, RandImagePaird, RandImagePairDict, generate_pair

SIZE = (24, 20)


def test_adds_the_pair_and_keeps_the_rest() -> None:
    item = {"id": 3}
    out = RandImagePaird(SIZE)(item)
    assert out["id"] == 3
    assert item == {"id": 3}
    assert set(out) == {"id", "moving", "fixed", "moving_label", "fixed_label", "ddf"}
    assert out["ddf"].shape == (2, *SIZE)


def test_keys() -> None:
    out = RandImagePaird(SIZE, keys=("a", "b", "c", "d", "e"))({"seed": 0})
    assert torch.equal(out["b"], generate_pair(SIZE, seed=0).fixed[0])
    assert torch.equal(out["e"], generate_pair(SIZE, seed=0).ddf[0])
    with pytest.raises(ValueError, match="five entries"):
        RandImagePaird(SIZE, keys=("moving", "fixed"))


def test_compose_reproduces() -> None:
    def draw() -> list[torch.Tensor]:
        transform = Compose([RandImagePaird(SIZE)]).set_random_state(seed=11)
        return [transform({})["moving"] for _ in range(2)]

    one, two = draw(), draw()
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], one[1])


def test_same_as_the_array_transform() -> None:
    array = RandImagePair(SIZE).set_random_state(seed=2)
    dictionary = RandImagePaird(SIZE).set_random_state(seed=2)
    assert torch.equal(array()["fixed"], dictionary({})["fixed"])


def test_seeded_items_are_fixed_pairs() -> None:
    transform = RandImagePaird(SIZE)
    first, again, other = (transform({"seed": s})["moving"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_in_a_loader_with_workers() -> None:
    dataset = Dataset([{"index": n} for n in range(4)], RandImagePaird(SIZE))
    batches = list(DataLoader(dataset, batch_size=2, num_workers=2))
    assert batches[0]["moving"].shape == (2, 1, *SIZE)
    images = torch.cat([batch["moving"] for batch in batches]).flatten(1)
    assert len(images.unique(dim=0)) == 4  # workers do not repeat each other


def test_pickles() -> None:
    transform = RandImagePaird(SIZE).set_random_state(seed=1)
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(transform({})["moving"], copy({})["moving"])


def test_aliases_and_monai_namespace() -> None:
    assert RandImagePaird is RandImagePairD is RandImagePairDict
    for name in ("RandImagePair", "RandImagePaird", "RandImagePairD", "RandImagePairDict"):
        assert getattr(monai.transforms, name) is getattr(common.transforms, name)


def test_from_a_config() -> None:
    config = {"_target_": "monai.transforms.RandImagePaird", "spatial_size": [16, 16], "num_labels": 4}
    transform = ConfigParser({"t": config}).get_parsed_content("t")
    assert transform({})["fixed"].shape == (1, 16, 16)
