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
"""Smaller training sets that nest: a larger one contains every smaller one of the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

__all__ = ["hold_out_pairs", "nested_subset", "set_pairs_aside"]

T = TypeVar("T")


def nested_subset(
    items: Sequence[T], *, fraction: float | None = None, count: int | None = None, seed: int = 0, at_least: int = 1
) -> list[T]:
    """Take a prefix of one seeded permutation (numpy's frozen ``RandomState``, so it stays the same for ever).

    Args:
        items: in an order that does not depend on the machine, such as a JSON's.
        fraction: of the items, in (0, 1], rounded half up.
        count: number of items. Give one of the two, or neither for all items in their own order.
        seed: of the permutation.
        at_least: fewest items that make sense; pairs of different subjects need 2.

    Returns:
        the chosen items, in permuted order.

    Raises:
        ValueError: when both are given, or the subset would be empty, too small or larger than the whole.

    Example:
        >>> nested_subset("abcdefgh", count=3)
        ['g', 'c', 'b']
        >>> nested_subset("abcdefgh", fraction=0.5)
        ['g', 'c', 'b', 'h']
    """
    if fraction is None and count is None:
        return list(items)
    if fraction is not None and count is not None:
        raise ValueError(f"give train_fraction or train_count, not both (found {fraction} and {count})")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"train_fraction must be in (0, 1], found {fraction}")
        count = math.floor(len(items) * fraction + 0.5)
    assert count is not None
    if count > len(items):
        raise ValueError(f"train_count {count} is more than the {len(items)} training subjects there are")
    if count < at_least:
        asked = f"train_fraction {fraction} of {len(items)}" if fraction is not None else "train_count"
        raise ValueError(f"{asked} gives {count} training subject(s), at least {at_least} are needed to make pairs")
    order = np.random.RandomState(seed).permutation(len(items))
    return [items[position] for position in order[:count]]


def hold_out_pairs(
    subjects: Sequence[Mapping[str, Any]], fraction: float = 0.1, seed: int = 0
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """Set subjects aside for validation, and pair each with the next one in a ring.

    Args:
        subjects: with ``id``, ``image`` and perhaps ``label``, ``mask`` and ``channels``.
        fraction: of the subjects; at least two are set aside.
        seed: of the choice.

    Returns:
        the subjects that are left for training, in their order, and the pairs of those set aside.

    Raises:
        ValueError: when fewer than two would be left, or the fraction is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hold_out must be in (0, 1), found {fraction}")
    count = max(2, math.floor(len(subjects) * fraction + 0.5))
    if len(subjects) - count < 2:
        raise ValueError(
            f"{len(subjects)} training subjects are too few to set {count} aside for validation: list validation pairs "
            "in the dataset JSON, or bring at least 4 subjects"
        )
    chosen = set(np.random.RandomState(seed).permutation(len(subjects))[:count].tolist())
    left = [subject for position, subject in enumerate(subjects) if position not in chosen]
    aside = [subjects[position] for position in sorted(chosen)]
    pairs = []
    for moving, fixed in zip(aside, [*aside[1:], aside[0]], strict=True):
        pair: dict[str, Any] = {}
        for role, subject in (("moving", moving), ("fixed", fixed)):
            pair |= {f"{role}_id": subject["id"], role: subject["image"]}
            pair |= {f"{role}_{key}": subject[key] for key in ("label", "mask", "channels") if subject.get(key)}
        pairs.append(pair)
    return left, pairs


def set_pairs_aside(pairs: Sequence[T], fraction: float = 0.1, seed: int = 0) -> tuple[list[T], list[T]]:
    """Set listed training pairs, such as the two phases of a heart, aside for validation.

    Args:
        pairs: of different subjects.
        fraction: of the pairs; at least one is set aside.
        seed: of the choice.

    Returns:
        the pairs that are left for training and those set aside, both in their order.

    Raises:
        ValueError: when none would be left, or the fraction is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"hold_out must be in (0, 1), found {fraction}")
    count = max(1, math.floor(len(pairs) * fraction + 0.5))
    if len(pairs) - count < 1:
        raise ValueError(f"{len(pairs)} training pair(s) are too few to set {count} aside: list validation pairs")
    chosen = set(np.random.RandomState(seed).permutation(len(pairs))[:count].tolist())
    left = [pair for position, pair in enumerate(pairs) if position not in chosen]
    return left, [pairs[position] for position in sorted(chosen)]
