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
from torch.utils.data import DataLoader

from common.data import GroupSampler


def test_one_process_sees_all_groups_in_order() -> None:
    assert list(GroupSampler(range(9), 3)) == list(range(9))


def test_groups_stay_whole_and_ranks_share_them() -> None:
    ranks = [list(GroupSampler(range(14), 3, num_replicas=2, rank=rank)) for rank in range(2)]
    assert ranks == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert all(len(GroupSampler(range(14), 3, 2, rank)) == 6 for rank in range(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_groups(workers: int) -> None:
    data = list(range(12))
    loader = DataLoader(data, batch_size=3, sampler=GroupSampler(data, 3, 2, 1), num_workers=workers)
    assert [batch.tolist() for batch in loader] == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "got 0 and 0"), ((3, 2, 2), r"rank in \[0, 2\), got 3 and 2"), ((3, 4, 0), "11 items in groups of 3")],
)
def test_impossible_shares(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupSampler(range(11), *arguments)
