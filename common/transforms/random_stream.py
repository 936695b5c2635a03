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
"""Random numbers for a batch in which every item has its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RandomStream", "item_seeds"]


class RandomStream:
    """One torch.Generator an item, so that an item of a batch can be drawn again alone, and on another device.

    Small tables are always drawn on the CPU and then moved, which makes them the same on every device; only
    :py:meth:`voxel_noise` draws where the images are, because there it is many numbers.

    Args:
        seeds: one seed for each item of the batch.
        device: where the numbers are wanted.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        # Their own generators: an option that draws voxels must not change what is drawn for the others.
        self._voxel_generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) numbers uniform in [low, high)."""
        numbers = torch.stack([torch.rand(shape, generator=g) for g in self._generators])
        return (low + (high - low) * numbers).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal numbers."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators]).to(self.device)

    def choice(self, values: Sequence[float], *shape: int) -> Tensor:
        """(B, *shape) picks from ``values``, all equally likely."""
        picks = torch.stack([torch.randint(len(values), shape, generator=g) for g in self._generators])
        return torch.tensor(list(values), dtype=torch.float32)[picks].to(self.device)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """(B, *shape) booleans that are True with the given probability."""
        return self.uniform(*shape) < probability

    def voxel_noise(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal numbers drawn on the device; other numbers than another kind of device's."""
        noise = [torch.randn(shape, generator=g, device=self.device) for g in self._voxel_generators]
        return torch.stack(noise)


def item_seeds(batch_size: int, seed: int | Sequence[int] | None, generator: torch.Generator | None) -> tuple[int, ...]:
    """The seed of each item: ``seed + b`` for item b, or the given sequence, or drawn from ``generator``.

    Args:
        batch_size: how many items.
        seed: the first item's seed, or all of them, or None.
        generator: where the seeds come from when ``seed`` is None; None is torch's global generator.

    Raises:
        ValueError: when both ``seed`` and ``generator`` are given, or the number of seeds differs from the batch size.
    """
    if seed is not None and generator is not None:
        raise ValueError("give either a seed or a generator, not both")
    if isinstance(seed, int):
        return tuple(seed + item for item in range(batch_size))
    if seed is not None:
        if len(seed) != batch_size:
            raise ValueError(f"{len(seed)} seeds are given for a batch of {batch_size}")
        return tuple(int(one) for one in seed)
    return tuple(torch.randint(2**62, (batch_size,), generator=generator).tolist())
