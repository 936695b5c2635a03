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
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["nested_subset"]

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
