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
"""Items that belong together, such as the pairs of a triplet, on one of several processes."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch.distributed as dist
from torch.utils.data import Sampler

__all__ = ["GroupSampler"]


class GroupSampler(Sampler[int]):
    """Deal groups of consecutive items out to ranks in turn, in order; a ``DistributedSampler`` deals out single items.

    Every rank gets the same number of groups: those that are left over are dropped, as are items at the end that make
    no group. With one process all groups come in order.

    Args:
        dataset: whose items to deal out. It shuffles itself, as ``PairDataset`` does by drawing anew each epoch.
        group: items in a group; the loader's ``batch_size`` is a multiple of it.
        num_replicas: number of ranks; that of the process group if not given.
        rank: of this process; that in the process group if not given.

    Raises:
        ValueError: when ``group`` is below 1, there is no such rank, or there are fewer groups than ranks.
    """

    def __init__(self, dataset: Sized, group: int, num_replicas: int | None = None, rank: int | None = None) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.group = group
        self.ranks = num_replicas or (dist.get_world_size() if running else 1)
        self.rank = rank if rank is not None else dist.get_rank() if running else 0
        if group < 1 or not 0 <= self.rank < self.ranks:
            raise ValueError(f"group must be at least 1 and rank in [0, {self.ranks}), got {group} and {self.rank}")
        self.count = len(dataset) // group // self.ranks
        if self.count < 1:
            raise ValueError(f"{len(dataset)} items in groups of {group} leave some of {self.ranks} ranks without any")

    def __len__(self) -> int:
        return self.count * self.group

    def __iter__(self) -> Iterator[int]:
        for turn in range(self.count):
            first = (turn * self.ranks + self.rank) * self.group
            yield from range(first, first + self.group)
