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
"""A dataset of registration pairs made from a list of subjects or of pairs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandomizableTrait
from monai.utils.misc import MAX_SEED
from torch import Tensor
from tqdm import tqdm

from common.data.epochs import EpochDataset
from common.data.pairing import (
    AllOrdered,
    AtlasToSubject,
    BothDirections,
    IntraSubject,
    Listed,
    Pairing,
    RandomPartner,
    Triplets,
    generator_for,
)
from common.data.subjects import split_pairs, with_ids
from common.data.truth import known_truths, load_truth

__all__ = ["PairDataset", "STRATEGIES"]

logger = logging.getLogger(__name__)

STRATEGIES = ("random_partner", "all_ordered", "atlas", "listed", "intra", "triplets")
_EITHER_WAY = ("random_partner", "intra", "listed")
_PROGRESS_FROM = 50


def load_subject(subject: Mapping[str, Any]) -> dict[str, Any]:
    """The transform used when none is given: load every file and put the channel first."""
    keys = [key for key in ("image", "label", "mask") if key in subject]
    loader = Compose([LoadImaged(keys), EnsureChannelFirstd(keys)])
    return dict(loader(dict(subject)))


class PairDataset(EpochDataset):
    """Pairs for training and evaluation, ready for MONAI's or torch's ``DataLoader``.

    A subject passes ``transform`` alone, before it is paired, with the keys ``image`` and, where there are any,
    ``label`` and ``mask``: loading, orientation, normalisation, padding. That result is deterministic, so it can be
    kept in memory. ``augment`` sees the finished item and is the place for everything random.

    An item is a dict of plain tensors: ``moving``, ``fixed`` (C,*S); ``moving_label``, ``fixed_label`` (1,*S) int32
    and ``moving_mask``, ``fixed_mask`` where *every* subject has one and the transform loads it; ``moving_affine``,
    ``fixed_affine`` (d+1,d+1) float64, voxel to RAS mm, after the transform; ``moving_id``, ``fixed_id`` str; and
    ``true_ddf`` (d,*S), ``moving_points``, ``fixed_points`` (N,d) where *every* listed pair knows its field or has
    landmarks (:mod:`common.data.truth`), on the grid after the transform too.

    Random pairs depend on ``(seed, epoch, index)`` alone. Samplers give every rank and worker its own indices, so the
    draws differ among them and yet do not change with their number. :meth:`set_epoch` also reaches workers that are
    already running (``persistent_workers``).

    Args:
        data: subjects (``image``, ``label``?, ``channels``?, ``id``?) or, for ``"listed"``, pairs (``moving``,
            ``fixed``, ``moving_label``?, ``fixed_label``?, ``moving_channels``?, ``fixed_channels``?, ``moving_id``?,
            ``fixed_id``?); absolute paths. The transform gets a subject with ``channels`` as a list of all its files
            under ``image``.
        strategy: ``"random_partner"``, ``"all_ordered"``, ``"atlas"``, ``"listed"``, ``"intra"`` or
            ``"triplets"``; see :mod:`common.data.pairing`. A batch of 3 is one triplet, in order and without a
            sampler that shuffles; a ``DistributedSampler`` would deal its pairs out to different ranks, where
            :class:`common.data.GroupSampler` keeps them together.
        transform: deterministic callable on one subject's dict. Default: load, channel first.
        augment: callable on one item. When it has ``set_random_state`` (MONAI), it is seeded for each item.
        seed: of partners and augmentation.
        cache: ``True`` keeps every transformed subject in memory, a number keeps that many, ``False`` none. The cache
            is filled here, before DataLoader workers start, so that they share one copy.
        atlas: for ``"atlas"``: the id of a subject in ``data``, a file, or a subject dict.
        atlas_is: the side of the atlas, ``"moving"`` or ``"fixed"``.
        group_key: for ``"intra"``: the key that says which scans are of one subject.
        length: pairs an epoch for all strategies but ``"all_ordered"``. Default: one for each subject (three in
            triplets), or the list as it is.
        both_directions: for ``"random_partner"``, ``"intra"`` and ``"listed"``: items 2k and 2k + 1 are one pair,
            registered either way: two optimiser steps in a row, or side by side in a batch of two. ``length`` counts
            both. Without a shuffling sampler they stay together. A ``DistributedSampler`` deals items out in turn: with
            an even number of ranks the two directions are in the same step, on neighbouring ranks.
        cache_workers: threads that fill the cache.
        progress: show a bar while the cache of more than 50 subjects is filled.

    Attributes:
        truths: which of ``true_ddf`` and ``landmarks`` items carry, for measures that need them.

    Raises:
        ValueError: for an unknown strategy, too few subjects, repeated ids, an unknown atlas, data of the wrong kind,
            a random transform in ``transform`` together with a cache, or ``both_directions`` of a strategy without.

    Example:
        >>> from common.data import PairDataset, load_cohort
        >>> cohort = load_cohort("synthetic")  # doctest: +SKIP
        >>> pairs = PairDataset(cohort.training, cache=True)  # doctest: +SKIP
        >>> tuple(pairs[0]["moving"].shape)  # doctest: +SKIP
        (1, 48, 48, 48)
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        *,
        strategy: str = "random_partner",
        transform: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        augment: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
        seed: int = 0,
        cache: bool | int = False,
        atlas: str | Path | Mapping[str, Any] | None = None,
        atlas_is: str = "moving",
        group_key: str = "subject",
        length: int | None = None,
        both_directions: bool = False,
        cache_workers: int = 2,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise ValueError(f"unknown strategy '{strategy}', expected one of {list(STRATEGIES)}")
        if both_directions and strategy not in _EITHER_WAY:
            raise ValueError(
                f"both_directions is for pairs of one of {list(_EITHER_WAY)}; strategy '{strategy}' decides "
                "itself which directions there are"
            )
        _check_kind(data, strategy)
        if cache is not False and transform is not None:
            _refuse_random(transform)
        self.transform = load_subject if transform is None else transform
        self.augment, self.seed, self.strategy = augment, int(seed), strategy
        self.subjects: list[dict[str, Any]]
        self.pairing: Pairing
        self.truths: list[str] = []
        self._pairs: dict[tuple[int, int], Mapping[str, Any]] = {}
        self._known: dict[tuple[int, int], dict[str, Tensor]] = {}
        if strategy == "listed":
            self.subjects, listed = split_pairs(data)
            # Either way, an epoch of the pairs themselves is one round of the list.
            own_length = len(listed) if both_directions and length is not None else length
            self.pairing = Listed(listed, self.seed, own_length)
            # What is known of a pair leads from fixed to moving, and not back.
            self.truths = [] if both_directions else known_truths(data)
            self._pairs = dict(zip(listed, data, strict=True)) if self.truths else {}
        else:
            self.subjects = with_ids(data)
            own_length = None if both_directions else length
            self.pairing = self._pairing(strategy, atlas, atlas_is, group_key, own_length)
        if both_directions:
            self.pairing = BothDirections(self.pairing, length)
        self.optional = [k for k in ("label", "mask") if self.subjects and all(s.get(k) for s in self.subjects)]
        self._cache = self._fill(len(self.subjects) if cache is True else int(cache), cache_workers, progress)

    def _pairing(
        self, strategy: str, atlas: str | Path | Mapping[str, Any] | None, side: str, group_key: str, length: int | None
    ) -> Pairing:
        if strategy == "random_partner":
            return RandomPartner(len(self.subjects), self.seed, length)
        if strategy == "all_ordered":
            return AllOrdered(len(self.subjects))
        if strategy == "triplets":
            return Triplets(len(self.subjects), self.seed, length)
        if strategy == "intra":
            return IntraSubject(self.subjects, group_key, self.seed, length)
        place = self._place_atlas(atlas)
        return AtlasToSubject(len(self.subjects), place, side, self.seed, length)

    def _place_atlas(self, atlas: str | Path | Mapping[str, Any] | None) -> int:
        if atlas is None:
            raise ValueError("strategy 'atlas' needs `atlas`: the id of a subject, a file or a subject dict")
        if not isinstance(atlas, Mapping):
            for position, subject in enumerate(self.subjects):
                if subject["id"] == str(atlas):
                    return position
            if not Path(atlas).is_file():
                raise ValueError(
                    f"the atlas '{atlas}' is neither a file nor one of the {len(self.subjects)} ids, "
                    f"which start with {[subject['id'] for subject in self.subjects[:3]]}"
                )
            atlas = {"image": str(atlas)}
        entry = with_ids([atlas])[0]
        for position, subject in enumerate(self.subjects):
            if str(subject["image"]) == str(entry["image"]):
                return position
        self.subjects.append(entry)
        return len(self.subjects) - 1

    def _fill(self, count: int, workers: int, progress: bool) -> dict[int, dict[str, Tensor]]:
        positions = range(min(count, len(self.subjects)))
        if not positions:
            return {}
        # Threads: loading and MONAI's transforms spend their time outside the interpreter lock.
        with ThreadPoolExecutor(max(1, workers)) as pool:
            loaded: Iterator[dict[str, Tensor]] = pool.map(self._load, positions)
            bar = tqdm(
                loaded, total=len(positions), desc="caching", disable=not progress or len(positions) <= _PROGRESS_FROM
            )
            return dict(zip(positions, bar, strict=True))

    def __len__(self) -> int:
        return len(self.pairing)

    def pair_ids(self, index: int) -> tuple[str, str]:
        """The moving and the fixed id of pair ``index`` in the present epoch, without loading anything."""
        moving, fixed = self.pairing.pair(self._in_range(index), self.epoch)
        return self.subjects[moving]["id"], self.subjects[fixed]["id"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = self._in_range(index)
        epoch = self.epoch
        moving, fixed = self.pairing.pair(index, epoch)
        item: dict[str, Any] = {}
        for role, position in (("moving", moving), ("fixed", fixed)):
            subject = self._subject(position)
            item[role] = subject["image"]
            item |= {f"{role}_{key}": value for key, value in subject.items() if key != "image"}
            item[f"{role}_id"] = self.subjects[position]["id"]
        item |= self._truth(moving, fixed, item)
        return item if self.augment is None else self._augmented(item, index, epoch)

    def _in_range(self, index: int) -> int:
        # Without IndexError a plain ``for item in dataset`` would never end.
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return int(index) % len(self)

    def _augmented(self, item: dict[str, Any], index: int, epoch: int) -> dict[str, Any]:
        assert self.augment is not None
        set_state = getattr(self.augment, "set_random_state", None)
        if set_state is not None:
            set_state(seed=int(generator_for(self.seed, epoch, index, 1).integers(MAX_SEED)))
        augmented = dict(self.augment(item))
        return {k: v.as_tensor() if isinstance(v, MetaTensor) else v for k, v in augmented.items()}

    def _subject(self, position: int) -> dict[str, Tensor]:
        if position in self._cache:
            # A copy: what a caller does to an item in place must not reach later epochs.
            return {key: value.clone() for key, value in self._cache[position].items()}
        return self._load(position)

    def _truth(self, moving: int, fixed: int, item: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is known of a pair, read once where both subjects are in the cache."""
        truth = self._known.get((moving, fixed))
        if truth is None:
            truth = load_truth(self._pairs[moving, fixed], item, self.truths) if self.truths else {}
            if moving in self._cache and fixed in self._cache:
                self._known[moving, fixed] = truth
        return {key: value.clone() for key, value in truth.items()}

    def _load(self, position: int) -> dict[str, Tensor]:
        subject = self.subjects[position]
        wanted = {key: subject[key] for key in ("image", *self.optional)}
        if subject.get("channels"):
            wanted["image"] = [subject["image"], *subject["channels"]]
        try:
            result = self.transform({**wanted, "id": subject["id"]})
        except Exception as error:
            # MONAI says in which transform it happened; the reason is at the other end of the chain.
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            raise RuntimeError(f"subject '{subject['id']}' could not be prepared ({wanted}): {reason}") from error
        image = result["image"]
        loaded = {"image": _plain(image), "affine": _affine(image)}
        for key in self.optional:
            if isinstance(result.get(key), (str, Path, type(None))):
                continue  # The transform leaves the path as it is: it does not load this kind of file.
            loaded[key] = _as_labels(_plain(result[key]), wanted[key])
            if loaded[key].shape[1:] != loaded["image"].shape[1:]:
                raise ValueError(
                    f"subject '{subject['id']}': the {key} {wanted[key]} has shape {tuple(loaded[key].shape[1:])} "
                    f"after the transform, its image {wanted['image']} has {tuple(loaded['image'].shape[1:])}"
                )
        return loaded


def _plain(value: Any) -> Tensor:
    """A contiguous torch tensor without MONAI's metadata, which collates faster and hides no state."""
    tensor = value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(np.asarray(value))
    return tensor.contiguous()


def _affine(image: Any) -> Tensor:
    dimensions = image.ndim - 1
    affine = image.affine if isinstance(image, MetaTensor) else torch.eye(dimensions + 1)
    return torch.as_tensor(to_affine_nd(dimensions, np.asarray(affine, dtype=np.float64)), dtype=torch.float64)


def _as_labels(label: Tensor, path: Any) -> Tensor:
    """Labels as int32: one dtype whatever the file has, so that subjects collate."""
    if label.is_floating_point():
        rounded = label.round()
        if not torch.equal(rounded, label):
            worst = label.flatten()[(rounded - label).abs().flatten().argmax()].item()
            raise ValueError(
                f"the label {path} holds a value that is no integer: {worst}; was it interpolated linearly?"
            )
        label = rounded
    return label.to(torch.int32)


def _check_kind(data: Sequence[Mapping[str, Any]], strategy: str) -> None:
    needed = ("moving", "fixed") if strategy == "listed" else ("image",)
    for position, entry in enumerate(data):
        if any(key not in entry for key in needed):
            raise ValueError(
                f"strategy '{strategy}' needs entries with {list(needed)}, but entry {position} has {list(entry)}"
            )


def _refuse_random(transform: Any) -> None:
    members = transform.flatten().transforms if isinstance(transform, Compose) else [transform]
    found = [type(member).__name__ for member in members if isinstance(member, RandomizableTrait)]
    found = [name for name in found if name != "Compose"]
    if found:
        raise ValueError(f"a cached transform must be deterministic, found {found}: pass them as `augment`")
