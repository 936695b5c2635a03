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
"""What every registration metric shares: rows per item, a mean that ignores absent labels, several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from monai.metrics import CumulativeIterationMetric
from torch import Tensor

__all__ = ["RegistrationMetric", "DEFINITIONS", "check_definition", "per_item_spacing", "nan_mean", "gather_objects"]

DEFINITIONS = ("standard", "learn2reg")


def check_definition(definition: str) -> str:
    """Accept the name of a set of definitions.

    Raises:
        ValueError: when it is neither ``"standard"`` nor ``"learn2reg"``.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {DEFINITIONS}, got {definition!r}")
    return definition


def nan_mean(values: Tensor, dim: int) -> Tensor:
    """Mean without the NaN entries along ``dim``; NaN where nothing else is there. Infinities stay."""
    present = ~values.isnan()
    total = torch.where(present, values, torch.zeros_like(values)).sum(dim)
    return total / present.sum(dim)


def per_item_spacing(spacing: Any, batch: int, dims: int) -> list[tuple[float, ...]]:
    """Bring a spacing to one tuple per item.

    Args:
        spacing: None (ones), a number, ``dims`` numbers, or one of these per item (``(B, dims)`` tensors too); mm.
        batch: number of items B.
        dims: number of spatial axes.

    Raises:
        ValueError: when the sizes do not fit or a spacing is not a positive number.
    """
    value = torch.as_tensor(1.0 if spacing is None else spacing, dtype=torch.float64).cpu()
    if value.ndim == 0:
        value = value.expand(dims)
    if value.ndim == 1 and value.shape[0] == dims:
        value = value.expand(batch, dims)
    if tuple(value.shape) != (batch, dims):
        raise ValueError(f"spacing must be a number, {dims} numbers or {batch} x {dims} numbers, got {spacing}")
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ValueError(f"spacing must be positive and finite, got {spacing}")
    return [tuple(row) for row in value.tolist()]


class RegistrationMetric(CumulativeIterationMetric):
    """A metric with one row of K values per item of the batch.

    ``metric(*tensors)`` returns and keeps ``(B, K)`` values, :meth:`get_buffer` gives all rows of all ranks,
    :meth:`aggregate` their mean and :meth:`reset` forgets them: MONAI's contract. What cannot be measured, such as the
    overlap of a label that is not there, is NaN and is left out of the mean.

    Unlike MONAI's own metrics any number of tensors can be given, and a rank that saw no item takes part in gathering
    (it would otherwise leave the others waiting for ever).

    Attributes:
        columns: the name of each of the K values, such as the label; ``("",)`` where there is one value.
    """

    columns: tuple[str, ...] = ("",)
    _buffers: list[list[Tensor]] | None
    _synced_tensors: list[Tensor] | None
    _synced: bool

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """Measure a batch and keep its rows.

        Args:
            inputs: batch-first tensors, or lists of channel-first tensors as MONAI's ``decollate_batch`` gives them.
            options: keywords of the metric, such as ``spacing``.

        Returns:
            ``(B, K)`` float32 values.
        """
        tensors = [_as_batch(value) for value in inputs]
        with torch.no_grad():
            rows = self._compute_tensor(*tensors, **options)
        self.extend(rows)
        return rows

    def _compute_tensor(self, *inputs: Any, **options: Any) -> Tensor:  # type: ignore[override]
        raise NotImplementedError

    def aggregate(self) -> Tensor:
        """Mean over items of the mean over the values that exist in each; a float tensor, NaN when there are none."""
        rows = self.get_buffer()
        if rows is None:
            return torch.tensor(float("nan"))
        return nan_mean(nan_mean(rows, 1), 0)

    def _sync(self) -> None:
        if self._synced:
            return
        rows = torch.stack(self._buffers[0]) if self._buffers else None
        # Through the CPU: rows are few, and a rank without any has no device to go by.
        parts = [part for part in gather_objects(None if rows is None else rows.cpu()) if part is not None]
        self._synced_tensors = [torch.cat(parts).to(parts[0] if rows is None else rows)] if parts else None
        self._synced = True


def gather_objects(value: Any) -> list[Any]:
    """A value of every rank, in the order of ranks; all must call this at the same time."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _as_batch(value: Any) -> Any:
    is_list = isinstance(value, Sequence) and bool(value) and all(isinstance(v, Tensor) and v.ndim > 1 for v in value)
    if is_list:
        return torch.stack([v.detach() for v in value])
    return value.detach() if isinstance(value, Tensor) else value
