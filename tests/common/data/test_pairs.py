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

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, DistributedSampler
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandGaussianNoised, SpatialPadd

from common.data import PairDataset
from common.io import load_image, save_image
from common.transforms import scan_transforms

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*")
Subjects = list[dict[str, Any]]


@pytest.fixture
def subjects(tmp_path: Path, four: list[dict[str, str]]) -> Subjects:
    return [
        {"id": f"s{i}", **{key: str(tmp_path / path) for key, path in entry.items()}} for i, entry in enumerate(four)
    ]


def ids(dataset: PairDataset) -> list[tuple[str, str]]:
    return [dataset.pair_ids(index) for index in range(len(dataset))]


def test_an_item_is_plain_tensors_with_ids_and_affines(subjects: Subjects) -> None:
    dataset = PairDataset(subjects)
    item = dataset[1]
    assert (item["moving_id"], item["fixed_id"]) == dataset.pair_ids(1)
    assert item["fixed_id"] == "s1"
    for role in ("moving", "fixed"):
        own = next(s for s in subjects if s["id"] == item[f"{role}_id"])
        assert type(item[role]) is torch.Tensor
        assert item[role].shape == (1, 6, 5, 4)
        np.testing.assert_array_equal(item[role][0], load_image(own["image"]).array)
        assert item[f"{role}_label"].dtype == torch.int32
        np.testing.assert_array_equal(item[f"{role}_label"][0], load_image(own["label"]).array)
        assert item[f"{role}_affine"].dtype == torch.float64
        np.testing.assert_allclose(item[f"{role}_affine"], np.diag([1, 1, 2, 1]))


@pytest.mark.parametrize("strategy", ["random_partner", "all_ordered", "atlas", "intra", "triplets"])
def test_every_strategy_collates(subjects: Subjects, strategy: str) -> None:
    subjects = [{**s, "subject": i // 2} for i, s in enumerate(subjects)]
    dataset = PairDataset(subjects, strategy=strategy, atlas="s2", cache=True)
    batch = next(iter(DataLoader(dataset, batch_size=2, num_workers=0)))
    assert batch["moving"].shape == (2, 1, 6, 5, 4)
    assert batch["fixed_affine"].shape == (2, 4, 4)
    assert all(m != f for m, f in zip(batch["moving_id"], batch["fixed_id"], strict=True))


def test_an_epoch_changes_partners_and_is_repeatable(subjects: Subjects) -> None:
    first, second = PairDataset(subjects, seed=5), PairDataset(subjects, seed=5)
    epochs = []
    for epoch in range(6):
        first.set_epoch(epoch)
        second.set_epoch(epoch)
        assert ids(first) == ids(second)
        epochs.append(tuple(ids(first)))
    assert len(set(epochs)) > 1
    first.set_epoch(0)
    assert tuple(ids(first)) == epochs[0]


def test_global_generators_are_neither_used_nor_touched(subjects: Subjects) -> None:
    dataset = PairDataset(subjects, seed=1)
    legacy = np.random.mtrand._rand
    before = legacy.get_state()[1].copy(), torch.get_rng_state()
    expected = ids(dataset)
    _ = dataset[0]
    assert np.array_equal(before[0], legacy.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())
    legacy.seed(77)
    torch.manual_seed(77)
    assert ids(dataset) == expected


def test_ranks_see_different_parts_of_one_epoch(subjects: Subjects) -> None:
    whole = PairDataset(subjects, seed=2)
    parts = []
    for rank in range(2):
        own = PairDataset(subjects, seed=2)
        sampler = DistributedSampler(own, num_replicas=2, rank=rank, shuffle=False)
        parts += [own.pair_ids(index) for index in sampler]
    assert sorted(parts) == sorted(ids(whole))


@pytest.mark.parametrize("cache", [False, True])
def test_workers_change_nothing_and_hear_of_a_new_epoch(subjects: Subjects, cache: bool) -> None:
    dataset = PairDataset(subjects, seed=3, length=8, cache=cache)
    loader = DataLoader(dataset, batch_size=1, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        found = [(batch["moving_id"][0], batch["fixed_id"][0]) for batch in loader]
        assert found == ids(dataset), "workers that already run draw for the epoch that was set last"
        seen.append(tuple(found))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_both_directions_are_one_batch_of_two_or_two_steps(subjects: Subjects, workers: int) -> None:
    dataset = PairDataset(subjects, both_directions=True, length=6, seed=3)
    dataset.set_epoch(1)
    for batch in DataLoader(dataset, batch_size=2, num_workers=workers):
        assert torch.equal(batch["moving"].flip(0), batch["fixed"])
        assert batch["moving_id"] == batch["fixed_id"][::-1]
    steps = [(step["moving_id"], step["fixed_id"]) for step in DataLoader(dataset, batch_size=1, num_workers=workers)]
    assert len(steps) == 6
    assert steps[1::2] == [(fixed, moving) for moving, fixed in steps[::2]]


def test_listed_pairs_go_either_way_too(subjects: Subjects) -> None:
    pairs = [
        {"moving": a["image"], "fixed": b["image"], "moving_id": a["id"], "fixed_id": b["id"]}
        for a, b in zip(subjects[::2], subjects[1::2], strict=True)
    ]
    forth = ids(PairDataset(pairs, strategy="listed"))
    assert ids(PairDataset(pairs, strategy="listed", both_directions=True)) == [
        pair for moving, fixed in forth for pair in ((moving, fixed), (fixed, moving))
    ]
    dataset = PairDataset(pairs, strategy="listed", both_directions=True, length=4, seed=1)
    rounds = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        found = ids(dataset)
        assert found[1::2] == [pair[::-1] for pair in found[::2]] and sorted(found[::2]) == sorted(forth)
        rounds.append(tuple(found))
    assert len(set(rounds)) == 2, "each round has an order of its own"
    assert torch.equal(dataset[0]["moving"], dataset[1]["fixed"])


def test_an_even_number_of_ranks_sees_both_directions_in_one_step(subjects: Subjects) -> None:
    dataset = PairDataset(subjects, both_directions=True)
    ranks = [list(DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=False)) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert dataset.pair_ids(first) == dataset.pair_ids(second)[::-1]


def test_a_batch_of_three_is_a_triplet(subjects: Subjects) -> None:
    dataset = PairDataset(subjects, strategy="triplets", seed=3)
    assert len(dataset) == 12
    for batch in DataLoader(dataset, batch_size=3):
        assert len(set(batch["moving_id"])) == 3
        assert batch["fixed_id"] == batch["moving_id"][1:] + batch["moving_id"][:1]


class Counting:
    """Loads, and remembers how often."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.load = Compose([LoadImaged(["image", "label"]), EnsureChannelFirstd(["image", "label"])])

    def __call__(self, subject: dict[str, Any]) -> Any:
        self.calls.append(subject["id"])
        return self.load(subject)


@pytest.mark.parametrize(("cache", "per_epoch"), [(True, 0), (4, 0), (1, 6), (False, 8)])
def test_the_cache_spares_reading(subjects: Subjects, cache: bool | int, per_epoch: int) -> None:
    transform = Counting()
    pairs = [{"moving": a["image"], "moving_label": a["label"], "moving_id": a["id"]} for a in subjects]
    pairs = [
        {**pair, "fixed": b["image"], "fixed_label": b["label"], "fixed_id": b["id"]}
        for pair, b in zip(pairs, subjects[1:] + subjects[:1], strict=True)
    ]
    dataset = PairDataset(pairs, strategy="listed", transform=transform, cache=cache)
    filled = len(transform.calls)
    assert filled == len(set(transform.calls)) == (len(subjects) if cache is True else int(cache))
    plain = PairDataset(pairs, strategy="listed")
    for index in range(4):
        assert torch.equal(dataset[index]["moving"], plain[index]["moving"])
    # With one of four kept, that one is spared in its two pairs.
    assert len(transform.calls) - filled == per_epoch


def test_changing_an_item_does_not_change_the_cache(subjects: Subjects) -> None:
    dataset = PairDataset(subjects, strategy="all_ordered", cache=True)
    before = dataset[0]["fixed"].clone()
    dataset[0]["fixed"].zero_()
    assert torch.equal(dataset[0]["fixed"], before)
    assert before.abs().sum() > 0


def test_augmentation_is_random_by_item_and_epoch_and_repeatable(subjects: Subjects) -> None:
    def make() -> PairDataset:
        noise = Compose([RandGaussianNoised(["moving"], prob=1.0, std=1.0)])
        return PairDataset(subjects, strategy="atlas", atlas="s0", augment=noise, seed=4, cache=True)

    dataset, other = make(), make()
    first = dataset[0]["moving"]
    assert type(first) is torch.Tensor
    _ = other[2]
    assert torch.equal(first, other[0]["moving"]), "the order of requests does not matter"
    assert not torch.equal(first, dataset[1]["moving"]), "the same atlas with other noise"
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0]["moving"])
    assert torch.equal(dataset[0]["fixed"], PairDataset(subjects, strategy="atlas", atlas="s0")[0]["fixed"])


def test_random_transforms_are_not_cached(subjects: Subjects) -> None:
    transform = Compose([LoadImaged("image"), RandGaussianNoised("image")])
    with pytest.raises(ValueError, match=r"RandGaussianNoised.*`augment`"):
        PairDataset(subjects, transform=transform, cache=True)


def test_the_affine_follows_the_transform(subjects: Subjects) -> None:
    keys = ["image", "label"]
    pad = Compose([LoadImaged(keys), EnsureChannelFirstd(keys), SpatialPadd(keys, (8, 7, 6))])
    item = PairDataset(subjects, transform=pad)[0]
    assert item["moving"].shape == (1, 8, 7, 6)
    # One voxel before the old origin along each axis, at spacings 1, 1, 2.
    np.testing.assert_allclose(item["moving_affine"][:3, 3], [-1, -1, -2])


def test_planes(tmp_path: Path) -> None:
    for name in "ab":
        save_image(tmp_path / f"{name}.nii.gz", np.random.default_rng(0).random((7, 5)), np.diag([2.0, 3.0, 1.0]))
    load = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), lambda d: {"image": d["image"][..., 0]}])
    item = PairDataset([{"image": str(tmp_path / f"{n}.nii.gz")} for n in "ab"], transform=load)[0]
    assert item["moving"].shape == (1, 7, 5)
    np.testing.assert_allclose(item["moving_affine"], np.diag([2.0, 3.0, 1.0]))


def test_real_planes(shared: Path) -> None:
    files = [{"image": str(shared / f"data/OASIS2D/oasis2d_000{n}.nrrd")} for n in range(3)]
    item = PairDataset(files)[0]
    assert item["moving"].shape == (1, 128, 128)
    np.testing.assert_allclose(item["moving_affine"], load_image(files[0]["image"]).affine)


def test_labels_are_given_only_when_all_subjects_have_one(subjects: Subjects) -> None:
    del subjects[2]["label"]
    assert "moving_label" not in PairDataset(subjects)[0]


def test_what_the_transform_does_not_load_is_left_out(subjects: Subjects) -> None:
    only_images = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])
    assert set(PairDataset(subjects, transform=only_images)[0]) == {
        f"{role}{key}" for role in ("moving", "fixed") for key in ("", "_id", "_affine")
    }


def test_masks_come_like_labels(subjects: Subjects) -> None:
    item = PairDataset([{**subject, "mask": subject["label"]} for subject in subjects])[0]
    assert torch.equal(item["moving_mask"], item["moving_label"])


def test_an_atlas_file_joins_the_subjects(subjects: Subjects) -> None:
    atlas, rest = subjects[0], subjects[1:]
    for given in (atlas["image"], atlas):
        dataset = PairDataset(rest, strategy="atlas", atlas=given)
        assert len(dataset) == 3
        assert dataset.pair_ids(0)[1] == "s1"
    assert "moving_label" in PairDataset(rest, strategy="atlas", atlas=atlas)[0]


def test_it_travels_to_spawned_workers(subjects: Subjects) -> None:
    dataset = PairDataset(subjects, transform=Counting(), cache=True)
    assert pickle.loads(pickle.dumps(dataset)).pair_ids(0) == dataset.pair_ids(0)


def test_iterating_ends(subjects: Subjects) -> None:
    dataset = PairDataset(subjects)
    assert len(list(dataset)) == 4
    with pytest.raises(IndexError):
        _ = dataset[4]


def test_labels_that_are_no_integers_are_named(tmp_path: Path, subjects: Subjects) -> None:
    save_image(subjects[0]["label"], np.full((6, 5, 4), 1.25, np.float32), np.eye(4))
    with pytest.raises(ValueError, match=r"case_0000_0000.nii.gz.*no integer: 1.25"):
        PairDataset(subjects, cache=True)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda s: s, {"strategy": "all"}, "unknown strategy 'all', expected one of"),
        (lambda s: s, {"strategy": "listed"}, r"needs entries with \['moving', 'fixed'\], but entry 0 has"),
        (lambda s: [{"moving": "a", "fixed": "b"}], {}, r"needs entries with \['image'\]"),
        (lambda s: s, {"strategy": "atlas"}, "needs `atlas`"),
        (lambda s: s, {"strategy": "atlas", "atlas": "s9"}, r"'s9' is neither a file nor one of the 4 ids.*'s0'"),
        (lambda s: s[:1], {}, "at least 2 subjects, found 1"),
        (
            lambda s: s,
            {"strategy": "all_ordered", "both_directions": True},
            "strategy 'all_ordered' decides itself",
        ),
        (lambda s: [*s, s[0]], {}, "two subjects have the id 's0'"),
    ],
)
def test_misuse_is_explained(subjects: Subjects, change: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairDataset(change(subjects), **arguments)


def test_a_subject_that_fails_is_named(subjects: Subjects) -> None:
    Path(subjects[3]["image"]).write_text("nothing")
    with pytest.raises(RuntimeError, match=r"subject 's3' could not be prepared.*case_0003"):
        PairDataset(subjects, cache=True)


def test_the_reason_for_a_failure_is_told_however_deep_it_lies(subjects: Subjects) -> None:
    save_image(subjects[3]["image"], np.full((6, 5, 4), np.nan, np.float32), np.eye(4))
    with pytest.raises(RuntimeError, match=r"subject 's3' could not be prepared.* has 120 values that are not finite"):
        PairDataset(subjects, transform=scan_transforms(["image"]), cache=True)
