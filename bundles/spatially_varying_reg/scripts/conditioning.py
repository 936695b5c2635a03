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
"""The hyper-parameters that a network is told: what they may be, what they are, and how the network sees them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Conditioning"]

# Below these a loss would reward what it is to penalise.
_LEAST = {"alpha": 1.0, "sigma": 0.0, "w": 0.0}


class Conditioning:
    """Values of some hyper-parameters, the same for all items of a batch or one an item, or left open.

    Args:
        ranges: (lowest, highest) value in training, by name: "alpha" (not below 1), "sigma", "w" (not negative).

    Attributes:
        names: of the hyper-parameters, in order.

    Raises:
        ValueError: when a range is not two rising, finite numbers that are allowed.
    """

    def __init__(self, **ranges: Sequence[float]) -> None:
        self.names = tuple(ranges)
        for name, ends in ranges.items():
            if len(ends) != 2 or not _LEAST[name] <= ends[0] < ends[1] < math.inf:
                raise ValueError(f"{name}_range must be two rising numbers from {_LEAST[name]:g}, got {tuple(ends)}")
        self.ranges = {name: (float(ends[0]), float(ends[1])) for name, ends in ranges.items()}
        self._values: dict[str, Tensor | None] = dict.fromkeys(self.names)
        self._warned: set[str] = set()

    def set(self, **values: float | Sequence[float] | Tensor | None) -> None:
        """Say the values; a hyper-parameter that is None or not named is left open again.

        Args:
            values: by name, one number or one for each item, (B,).

        Raises:
            ValueError: for an unknown name, or values that are not finite or too low; nothing is changed then.
        """
        unknown = [name for name, value in values.items() if value is not None and name not in self.names]
        if unknown:
            raise ValueError(f"the network takes {' and '.join(self.names)}, not {', '.join(unknown)}")
        self._values = {name: self._checked(name, values.get(name)) for name in self.names}
        for name, (low, high) in self.ranges.items():
            value, slack = self._values[name], 1e-6 * high  # what float32 may have rounded away
            if value is None or name in self._warned or (low - slack <= value.min() and value.max() <= high + slack):
                continue
            self._warned.add(name)
            warnings.warn(f"{name} {value.tolist()} is outside the trained range [{low:g}, {high:g}]", stacklevel=3)

    @staticmethod
    def _checked(name: str, value: float | Sequence[float] | Tensor | None) -> Tensor | None:
        if value is None:
            return None
        value = torch.as_tensor(value, dtype=torch.float64).detach().cpu().reshape(-1).clone()
        if value.numel() == 0 or not value.isfinite().all() or value.min() < _LEAST[name]:
            raise ValueError(f"{name} must be finite and at least {_LEAST[name]:g}, got {value.tolist()}")
        return value

    @property
    def shared(self) -> bool:
        """Whether all items have the same values, those that are left open counted at mid-range."""
        return all(value is None or value.numel() == 1 for value in self._values.values())

    def values(self, batch: int, *, sample: bool) -> Tensor:
        """Values for each item, (B, hyper-parameters), float32 on the CPU.

        Args:
            batch: number of items B.
            sample: draw what is left open, uniformly over its range and for each item; else it is mid-range.

        Raises:
            ValueError: when values were given for another number of items.
        """
        columns = []
        for name in self.names:
            value, (low, high) = self._values[name], self.ranges[name]
            if value is None:
                value = low + (high - low) * (torch.rand(batch) if sample else torch.tensor([0.5]))
            if len(value) not in (1, batch):
                raise ValueError(f"{name} was given for {len(value)} items, the batch has {batch}")
            columns.append(value.float().expand(batch))
        return torch.stack(columns, dim=1)

    def normalised(self, values: Tensor) -> Tensor:
        """``values`` (..., hyper-parameters) as the network sees them: 0 to 1 over the trained range."""
        low, high = torch.tensor([self.ranges[name] for name in self.names]).unbind(1)
        return (values - low) / (high - low)
