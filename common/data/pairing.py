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
"""Who is registered to whom: from an index to a (moving, fixed) pair of subjects.

A pairing knows only ids and counts. It has no state but the epoch, so that a pair depends on nothing but
``(seed, epoch, index)``: not on the number of DataLoader workers, not on the rank, not on any global generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = [
    "AllOrdered",
    "AtlasToSubject",
    "BothDirections",
    "IntraSubject",
    "Listed",
    "Pairing",
    "RandomPartner",
    "Triplets",
    "generator_for",
]


def generator_for(*entropy: int) -> np.random.Generator:
    """A generator that is a function of its arguments only, such as ``(seed, epoch, index)``.

    Neighbouring numbers give unrelated streams: numpy's ``SeedSequence`` hashes them.
    """
    return np.random.default_rng(np.random.SeedSequence([int(number) for number in entropy]))


class Pairing(Protocol):
    """The rule by which a dataset makes pairs."""

    def __len__(self) -> int:
        """How many pairs an epoch has."""
        ...

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """The positions of the moving and of the fixed subject of pair ``index`` in ``epoch``."""
        ...


class RandomPartner:
    """Every subject is the fixed one in turn; its moving partner is drawn anew each epoch, never itself.

    Args:
        count: number of subjects, at least 2.
        seed: of the draw.
        length: pairs an epoch. The turn goes on where the epoch before ended, so that epochs shorter than the cohort
            leave no subject out. Default: one pair for each subject.

    Raises:
        ValueError: with fewer than two subjects.
    """

    def __init__(self, count: int, seed: int = 0, length: int | None = None) -> None:
        if count < 2:
            raise ValueError(f"a random partner needs at least 2 subjects, found {count}")
        self.count, self.seed, self.length = count, seed, count if length is None else length

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Draw among the ``count - 1`` others, without rejection, so that each is equally likely."""
        fixed = (epoch * self.length + index) % self.count
        draw = int(generator_for(self.seed, epoch, index).integers(self.count - 1))
        return (draw if draw < fixed else draw + 1), fixed


class AllOrdered:
    """All ``n (n - 1)`` ordered pairs of different subjects, fixed subject slowest.

    Args:
        count: number of subjects, at least 2.

    Raises:
        ValueError: with fewer than two subjects.
    """

    def __init__(self, count: int) -> None:
        if count < 2:
            raise ValueError(f"ordered pairs need at least 2 subjects, found {count}")
        self.count = count

    def __len__(self) -> int:
        return self.count * (self.count - 1)

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Pair ``index``, the same in every epoch."""
        fixed, partner = divmod(index, self.count - 1)
        return (partner if partner < fixed else partner + 1), fixed


class Listed:
    """Pairs as a list gives them.

    Args:
        pairs: positions of (moving, fixed) subjects.
        seed: of the order in which pairs take turns, where ``length`` is given.
        length: pairs an epoch. The turn goes on where the epoch before ended, and each round through the list has an
            order of its own. Default: the list, in its order, every epoch.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], seed: int = 0, length: int | None = None) -> None:
        self.pairs, self.seed, self.length = list(pairs), seed, length

    def __len__(self) -> int:
        return len(self.pairs) if self.length is None or not self.pairs else self.length

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Pair ``index``, the same in every epoch unless there is a ``length``."""
        if self.length is None:
            return self.pairs[index]
        turn, place = divmod(epoch * self.length + index, len(self.pairs))
        return self.pairs[int(generator_for(self.seed, turn, len(self.pairs)).permutation(len(self.pairs))[place])]


class AtlasToSubject(Listed):
    """One atlas against every other subject.

    Args:
        count: number of subjects, the atlas among them.
        atlas: position of the atlas.
        atlas_is: which side the atlas takes: ``"moving"`` (atlas to subject) or ``"fixed"``.
        seed: of the order in which subjects take turns, where ``length`` is given.
        length: pairs an epoch, see :class:`Listed`.

    Raises:
        ValueError: when there is no other subject, or ``atlas_is`` is neither.
    """

    def __init__(
        self, count: int, atlas: int, atlas_is: str = "moving", seed: int = 0, length: int | None = None
    ) -> None:
        if atlas_is not in ("moving", "fixed"):
            raise ValueError(f"atlas_is must be 'moving' or 'fixed', found '{atlas_is}'")
        pairs = [(atlas, subject) for subject in range(count) if subject != atlas]
        if not pairs:
            raise ValueError("atlas pairs need at least one subject besides the atlas, found none")
        super().__init__(pairs if atlas_is == "moving" else [pair[::-1] for pair in pairs], seed, length)


class IntraSubject:
    """Scans of one subject against each other: several visits, phases or modalities.

    Every scan that has a sibling is the fixed one in turn, with a sibling drawn anew each epoch.

    Args:
        subjects: subject entries.
        key: the entry's key that names the person or animal, such as ``"subject"``.
        seed: of the draw.
        length: pairs an epoch, see :class:`RandomPartner`. Default: one for each scan that has a sibling.

    Raises:
        KeyError: when an entry lacks the key.
        ValueError: when no group has two scans.
    """

    def __init__(
        self, subjects: Sequence[Mapping[str, Any]], key: str, seed: int = 0, length: int | None = None
    ) -> None:
        groups: dict[Any, list[int]] = {}
        for position, subject in enumerate(subjects):
            if key not in subject:
                raise KeyError(
                    f"entry '{subject.get('id', position)}' has no group key '{key}'; it has {list(subject)}"
                )
            groups.setdefault(subject[key], []).append(position)
        alone = [name for name, members in groups.items() if len(members) < 2]
        self.scans = [(own, members) for members in groups.values() if len(members) > 1 for own in members]
        if not self.scans:
            raise ValueError(f"intra-subject pairs need a '{key}' with at least 2 scans; all {len(groups)} have one")
        if alone:
            warnings.warn(f"{len(alone)} '{key}' with a single scan make no pair: {alone[:5]}", stacklevel=2)
        self.seed, self.length = seed, len(self.scans) if length is None else length

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Draw among the siblings of scan ``index``."""
        fixed, members = self.scans[(epoch * self.length + index) % len(self.scans)]
        others = [member for member in members if member != fixed]
        return others[int(generator_for(self.seed, epoch, index).integers(len(others)))], fixed


class BothDirections:
    """Every pair of another pairing twice in a row: as it is, then with moving and fixed exchanged.

    Args:
        pairing: where the pairs come from; an epoch of its own is one round of all it has.
        length: directed pairs an epoch. The turn goes on where the epoch before ended, so that after an odd number the
            next epoch begins with the direction that is still due. Default: two for each pair of ``pairing``.

    Raises:
        ValueError: for a length below 1.
    """

    def __init__(self, pairing: Pairing, length: int | None = None) -> None:
        if length is not None and length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.pairing, self.length = pairing, 2 * len(pairing) if length is None else length

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Pair ``index // 2`` of the turn, exchanged for odd numbers."""
        number, exchanged = divmod(epoch * self.length + index, 2)
        turn, place = divmod(number, len(self.pairing))
        moving, fixed = self.pairing.pair(place, turn)
        return (fixed, moving) if exchanged else (moving, fixed)


class Triplets:
    """Three subjects a, b, c at a time, as the pairs (a, b), (b, c), (c, a), whose mappings lead round to the start.

    Every subject is the first one in turn; the other two are drawn anew each epoch, all three different.

    Args:
        count: number of subjects, at least 3.
        seed: of the draw.
        length: pairs an epoch, three for each triplet. The turn goes on where the epoch before ended. Default: one
            triplet for each subject.

    Raises:
        ValueError: with fewer than three subjects, or a length that is no positive multiple of 3.
    """

    def __init__(self, count: int, seed: int = 0, length: int | None = None) -> None:
        if count < 3:
            raise ValueError(f"triplets need at least 3 subjects, found {count}")
        if length is not None and (length < 3 or length % 3):
            raise ValueError(f"the length of triplets must be a positive multiple of 3 pairs, got {length}")
        self.count, self.seed, self.length = count, seed, 3 * count if length is None else length

    def __len__(self) -> int:
        return self.length

    def pair(self, index: int, epoch: int) -> tuple[int, int]:
        """Pair ``index % 3`` of triplet ``index // 3``."""
        number, side = divmod(index, 3)
        first = (epoch * (self.length // 3) + number) % self.count
        others = generator_for(self.seed, epoch, number).choice(self.count - 1, 2, replace=False).tolist()
        triplet = (first, *(other if other < first else other + 1 for other in others))
        return triplet[side], triplet[(side + 1) % 3]
