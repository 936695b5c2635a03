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
"""An endless supply of random image pairs, reproducible from one seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.data.epochs import EpochDataset
from common.transforms import RandImagePair

__all__ = ["RandomPairDataset"]


class RandomPairDataset(EpochDataset):
    """Random pairs, each drawn from (seed, epoch, index) alone: the same on any number of processes and workers.

    Args:
        transform: draws one pair.
        length: pairs an epoch.
        seed: of the run.
        renew: draw new pairs each epoch (training) or always the same ones (validation).

    Raises:
        ValueError: for a length below 1.
    """

    def __init__(self, transform: RandImagePair, length: int, seed: int = 0, renew: bool = True) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.transform = transform
        self.data = range(length)
        self.seed = seed
        self.renew = renew

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draw a pair: images (1, *S), label maps (1, *S) and ``true_ddf`` (d, *S), the field that maps them exactly.

        Raises:
            IndexError: past the end, as iteration needs.
        """
        if not 0 <= index < len(self.data):
            raise IndexError(index)
        words = (self.seed, self.epoch if self.renew else 0, index, int(self.renew))
        state = int(np.random.SeedSequence(words).generate_state(1)[0])
        self.transform.set_random_state(seed=state)
        pair = dict(self.transform())
        pair["true_ddf"] = pair.pop("ddf")
        pair["moving_id"], pair["fixed_id"] = f"random_{state}_moving", f"random_{state}_fixed"
        return pair
