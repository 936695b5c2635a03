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
"""The epoch that a dataset is in, seen by every worker."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

__all__ = ["EpochDataset"]


class EpochDataset(Dataset):
    """A dataset whose items depend on the epoch.

    The number lies in shared memory, so that workers that already run (``persistent_workers``) see a new one; torch
    pickles it as a handle.
    """

    def __init__(self) -> None:
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins."""
        self._epoch[0] = int(epoch)

    @property
    def epoch(self) -> int:
        """The epoch of the last :meth:`set_epoch`; 0 at first."""
        return int(self._epoch[0])
