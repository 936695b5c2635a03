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
"""Array transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from torch import Tensor

from common.transforms.random_images import PairOptions, checked_size, generate_pair

__all__ = ["RandImagePair"]


class RandImagePair(RandomizableTransform):
    """Generate a random pair of images with label maps and the exact field between them.

    It needs no input. Each call draws one seed from :py:attr:`R`, so ``set_random_state``, also a Compose's, makes it
    reproducible, and the drawn seed alone makes the pair again.

    Args:
        spatial_size: of the images, 2-D or 3-D.
        device: where the pairs are made.
        options: fields of :py:class:`common.transforms.PairOptions`.

    Raises:
        ValueError: when the size is not 2-D or 3-D, or an option is out of its range.
        TypeError: when an option is unknown.
    """

    def __init__(self, spatial_size: Sequence[int], device: torch.device | str = "cpu", **options: Any) -> None:
        super().__init__(prob=1.0)
        PairOptions(**options)  # complain now rather than at the first call
        self.spatial_size = checked_size(spatial_size)
        self.device = torch.device(device)
        self.options = options
        self._seed: int | None = None

    def randomize(self, data: Any = None) -> None:
        """Draw the next pair's seed."""
        super().randomize(data)
        self._seed = int(self.R.randint(0, 2**62, dtype=np.int64))

    def __call__(self, data: Any = None, randomize: bool = True, seed: int | None = None) -> dict[str, Tensor]:
        """Generate a pair.

        Args:
            data: ignored; there for the place in a Compose.
            randomize: draw a new seed; otherwise the last pair is made again.
            seed: the pair's seed, instead of a drawn one.

        Returns:
            ``moving``, ``fixed`` (1, *S) float32 in [0, 1]; ``moving_label``, ``fixed_label`` (1, *S) int32;
            ``ddf`` (d, *S) float32 voxels, from fixed to moving.
        """
        if seed is not None:
            self._seed = int(seed)
        elif randomize or self._seed is None:
            self.randomize()
        assert self._seed is not None
        pair = generate_pair(self.spatial_size, seed=self._seed, device=self.device, **self.options)
        return {name: value[0] for name, value in pair._asdict().items() if isinstance(value, Tensor)}
