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
"""Dictionary transforms, with MONAI's aliases ``...d``, ``...D`` and ``...Dict``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import MapTransform, RandomizableTransform

from common.transforms.array import RandImagePair

__all__ = ["RandImagePairD", "RandImagePairDict", "RandImagePaird"]

_PAIR_KEYS = ("moving", "fixed", "moving_label", "fixed_label", "ddf")


class RandImagePaird(MapTransform, RandomizableTransform):
    """Dictionary version of :py:class:`common.transforms.RandImagePair`: adds a random pair to the item.

    Args:
        spatial_size: of the images, 2-D or 3-D.
        keys: where moving image, fixed image, moving label, fixed label and field go, in that order.
        seed_key: when the item has this key, its value is the pair's seed. A datalist ``[{"seed": 1}, {"seed": 2}]``
            is thus a fixed set of pairs, for validation; items without the key are drawn anew each time.
        device: where the pairs are made.
        options: fields of :py:class:`common.transforms.PairOptions`.

    Raises:
        ValueError: when there are not five keys, or an option is out of its range.
        TypeError: when an option is unknown.
    """

    def __init__(
        self,
        spatial_size: Sequence[int],
        keys: Sequence[str] = _PAIR_KEYS,
        seed_key: str = "seed",
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob=1.0)
        if len(self.keys) != len(_PAIR_KEYS):
            raise ValueError(f"keys must name the five entries {_PAIR_KEYS}, got {tuple(self.keys)}")
        self.seed_key = seed_key
        self.generator = RandImagePair(spatial_size, device, **options)

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> RandImagePaird:
        """Set the state of this transform and of the array transform in it."""
        super().set_random_state(seed, state)
        self.generator.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the five entries added (or replaced)."""
        item = dict(data)
        seed = item.get(self.seed_key)
        pair = self.generator(seed=None if seed is None else int(seed))
        item.update(zip(self.keys, (pair[name] for name in _PAIR_KEYS), strict=True))
        return item


RandImagePairD = RandImagePairDict = RandImagePaird
