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
from hypothesis import given
from hypothesis import strategies as st

from common.data import nested_subset
from common.data.subsets import hold_out_pairs


@given(st.integers(2, 200), st.integers(0, 5), st.data())
def test_a_larger_subset_contains_the_smaller(total: int, seed: int, data: st.DataObject) -> None:
    small = data.draw(st.integers(1, total))
    large = data.draw(st.integers(small, total))
    items = list(range(total))
    first, second = (nested_subset(items, count=count, seed=seed) for count in (small, large))
    assert second[:small] == first
    assert len(set(second)) == large


@pytest.mark.parametrize(("fraction", "count"), [(0.05, 20), (0.1, 40), (0.2, 81), (0.4, 161), (0.6, 242), (1.0, 403)])
def test_fractions_round_half_up(fraction: float, count: int) -> None:
    assert len(nested_subset(range(403), fraction=fraction)) == count


def test_no_choice_is_everything_in_order() -> None:
    assert nested_subset("abc") == ["a", "b", "c"]


def test_numpy_has_not_changed_its_stream() -> None:
    assert nested_subset(range(10), count=10) == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.5, "count": 3}, "not both"),
        ({"fraction": 0.0}, r"in \(0, 1\], found 0.0"),
        ({"fraction": 1.5}, r"in \(0, 1\], found 1.5"),
        ({"count": 11}, "more than the 10"),
        ({"count": 1, "at_least": 2}, "gives 1 training subject.*at least 2 are needed to make pairs"),
        ({"fraction": 0.04}, "train_fraction 0.04 of 10 gives 0"),
    ],
)
def test_impossible_subsets(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nested_subset(range(10), **arguments)  # type: ignore[arg-type]


def test_held_out_subjects_are_paired_in_a_ring_and_never_trained_on() -> None:
    subjects = [{"id": f"s{i}", "image": f"s{i}.nii.gz", "label": f"l{i}.nii.gz"} for i in range(25)]
    left, pairs = hold_out_pairs(subjects, 0.12)
    aside = {pair["moving_id"] for pair in pairs}
    assert len(pairs) == 3 and len(left) == 22
    assert aside == {pair["fixed_id"] for pair in pairs}
    assert not aside & {subject["id"] for subject in left}
    assert all(pair["moving_id"] != pair["fixed_id"] for pair in pairs)
    assert pairs[0]["moving_label"] == pairs[0]["moving"].replace("s", "l", 1)
    assert hold_out_pairs(subjects, 0.12) == (left, pairs)


def test_too_few_subjects_to_hold_out_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="3 training subjects are too few to set 2 aside"):
        hold_out_pairs([{"id": str(i), "image": str(i)} for i in range(3)])
