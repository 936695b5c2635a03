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

from collections import Counter

import pytest

from common.data.pairing import (
    AllOrdered,
    AtlasToSubject,
    BothDirections,
    IntraSubject,
    Listed,
    Pairing,
    RandomPartner,
    Triplets,
)


def drawn(pairing: Pairing, epoch: int) -> list[tuple[int, int]]:
    return [pairing.pair(index, epoch) for index in range(len(pairing))]


def test_a_random_partner_is_never_the_subject_itself_and_every_other_occurs() -> None:
    pairing = RandomPartner(4)
    seen = Counter(pair for epoch in range(200) for pair in drawn(pairing, epoch))
    assert set(seen) == {(moving, fixed) for moving in range(4) for fixed in range(4) if moving != fixed}
    # 200 draws among three partners: 67 each; four standard deviations are 27.
    assert all(abs(count - 200 / 3) < 27 for count in seen.values())


def test_random_partners_depend_on_seed_epoch_and_index_only() -> None:
    pairing = RandomPartner(50, seed=3)
    epoch = drawn(pairing, 7)
    assert epoch == drawn(RandomPartner(50, seed=3), 7)
    assert pairing.pair(20, 7) == epoch[20], "no matter what was asked before"
    assert epoch != drawn(pairing, 8)
    assert epoch != drawn(RandomPartner(50, seed=4), 7)


def test_a_longer_epoch_goes_round_again_with_other_partners() -> None:
    pairing = RandomPartner(30, length=90)
    pairs = drawn(pairing, 0)
    assert [fixed for _, fixed in pairs] == [*range(30)] * 3
    assert pairs[:30] != pairs[30:60]


def test_short_epochs_leave_no_subject_out() -> None:
    pairing = RandomPartner(10, length=4)
    fixed = [[pair[1] for pair in drawn(pairing, epoch)] for epoch in range(5)]
    assert fixed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    visits = [{"id": f"{person}{scan}", "subject": person} for person in "abc" for scan in "12"]
    intra = IntraSubject(visits, "subject", length=3)
    assert {pair[1] for epoch in range(2) for pair in drawn(intra, epoch)} == set(range(6))


def test_all_ordered_pairs_once() -> None:
    pairing = AllOrdered(4)
    pairs = [pairing.pair(index, 0) for index in range(len(pairing))]
    assert len(pairs) == 12
    assert set(pairs) == {(moving, fixed) for moving in range(4) for fixed in range(4) if moving != fixed}


def test_atlas_pairs() -> None:
    moving = AtlasToSubject(4, atlas=1)
    assert [moving.pair(index, 0) for index in range(len(moving))] == [(1, 0), (1, 2), (1, 3)]
    fixed = AtlasToSubject(3, atlas=2, atlas_is="fixed")
    assert [fixed.pair(index, 0) for index in range(len(fixed))] == [(0, 2), (1, 2)]


def test_short_epochs_of_an_atlas_take_every_subject_in_turn_and_in_changing_order() -> None:
    pairing = AtlasToSubject(7, atlas=3, seed=1, length=2)
    rounds = [[pair for epoch in range(3 * turn, 3 * turn + 3) for pair in drawn(pairing, epoch)] for turn in range(4)]
    assert all(sorted(pairs) == [(3, subject) for subject in (0, 1, 2, 4, 5, 6)] for pairs in rounds)
    assert len({tuple(pairs) for pairs in rounds}) > 1


def test_listed_pairs_are_the_list() -> None:
    pairing = Listed([(3, 1), (0, 2)])
    assert [pairing.pair(index, 9) for index in range(len(pairing))] == [(3, 1), (0, 2)]


def test_visits_are_paired_within_their_subject() -> None:
    visits = [{"id": f"{who}{visit}", "subject": who} for who in "abc" for visit in range(3)]
    pairing = IntraSubject(visits, "subject")
    assert len(pairing) == 9
    seen = {pair for epoch in range(50) for pair in drawn(pairing, epoch)}
    assert seen == {(m, f) for m in range(9) for f in range(9) if m != f and m // 3 == f // 3}


def test_subjects_with_one_visit_are_named() -> None:
    visits = [{"subject": who} for who in "aab"]
    with pytest.warns(UserWarning, match=r"1 'subject' with a single scan make no pair: \['b'\]"):
        assert len(IntraSubject(visits, "subject")) == 2
    with pytest.raises(ValueError, match="all 2 have one"):
        IntraSubject([{"subject": who} for who in "ab"], "subject")
    with pytest.raises(KeyError, match="no group key 'person'"):
        IntraSubject(visits, "person")


@pytest.mark.parametrize("pairing", [RandomPartner, AllOrdered])
@pytest.mark.parametrize("count", [0, 1])
def test_one_subject_makes_no_pair(pairing: type, count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 subjects, found {count}"):
        pairing(count)


def test_an_atlas_alone_makes_no_pair() -> None:
    with pytest.raises(ValueError, match="besides the atlas"):
        AtlasToSubject(1, atlas=0)
    with pytest.raises(ValueError, match="'moving' or 'fixed', found 'both'"):
        AtlasToSubject(3, atlas=0, atlas_is="both")


def test_both_directions_follow_each_other() -> None:
    base = RandomPartner(7, seed=2)
    pairing = BothDirections(RandomPartner(7, seed=2))
    assert len(pairing) == 14
    for epoch in (0, 3):
        pairs = [pairing.pair(index, epoch) for index in range(14)]
        assert pairs[::2] == drawn(base, epoch)
        assert pairs[1::2] == [(fixed, moving) for moving, fixed in pairs[::2]]


@pytest.mark.parametrize("length", [1, 4, 5, 30])
def test_both_directions_stay_together_over_epochs_of_any_length(length: int) -> None:
    pairing = BothDirections(RandomPartner(6, seed=2), length)
    pairs = [pairing.pair(index, epoch) for epoch in range(24) for index in range(len(pairing))]
    assert len(pairs) == 24 * length
    assert pairs[1::2] == [(fixed, moving) for moving, fixed in pairs[::2]]
    assert {fixed for _, fixed in pairs} == set(range(6))
    assert [fixed for _, fixed in pairs[::2]] == [k % 6 for k in range(12 * length)]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        BothDirections(RandomPartner(6), 0)


def test_listed_pairs_take_turns_in_an_order_of_their_own_each_round() -> None:
    pairs = [(n, n + 10) for n in range(6)]
    pairing = Listed(pairs, seed=1, length=4)
    seen = [pairing.pair(index, epoch) for epoch in range(6) for index in range(len(pairing))]
    rounds = [seen[start : start + 6] for start in range(0, 24, 6)]
    assert len(pairing) == 4 and all(sorted(turn) == pairs for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert seen[9] == Listed(pairs, seed=1, length=4).pair(1, 2)
    assert [Listed(pairs).pair(index, 3) for index in range(6)] == pairs
    assert len(Listed([], length=4)) == 0


def test_triplets_lead_round() -> None:
    pairing = Triplets(5, seed=1)
    seen: Counter[tuple[int, ...]] = Counter()
    for epoch in range(200):
        pairs = drawn(pairing, epoch)
        assert len(pairs) == 15
        for number in range(5):
            (a, b), (b_again, c), (c_again, a_again) = pairs[3 * number : 3 * number + 3]
            assert (a, b, c) == (a_again, b_again, c_again)
            assert a == number and len({a, b, c}) == 3
            seen[a, b, c] += 1
    # 1000 draws of the 60 ordered triplets: 17 each; four standard deviations are 16.
    assert len(seen) == 60 and max(seen.values()) < 33


def test_triplets_depend_on_seed_epoch_and_number_only() -> None:
    pairing = Triplets(30, seed=3, length=12)
    epoch = drawn(pairing, 7)
    assert pairing.pair(10, 7) == drawn(Triplets(30, seed=3, length=12), 7)[10]
    assert [moving for moving, _ in epoch[::3]] == [28, 29, 0, 1], "short epochs leave no subject out"
    assert epoch != drawn(Triplets(30, seed=4, length=12), 7)
    assert len({drawn(Triplets(30, length=90), epoch)[0][1] for epoch in range(9)}) > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2,), "at least 3 subjects, found 2"), ((9, 0, 25), "multiple of 3 pairs, got 25"), ((9, 0, 0), "got 0")],
)
def test_impossible_triplets(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Triplets(*arguments)
