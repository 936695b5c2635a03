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
"""Measures of stacks whose slices have nothing to do with each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric, nan_mean

__all__ = ["PerSlice"]


class PerSlice(RegistrationMetric):
    """A 2-D metric of every slice of a stack, and the mean over slices for each item.

    What cannot be measured in a slice, such as the distance of a structure that is not there, is left out of its mean.

    Args:
        metric: takes tensors (B, C, X, Y).
        field: whether the first input is a field (B, 3, X, Y, Z), which must not move along the last axis; its first
            two components are taken.
    """

    def __init__(self, metric: RegistrationMetric, field: bool = False) -> None:
        super().__init__()
        self.metric, self.field = metric, field
        self.columns = metric.columns

    def _compute_tensor(self, *inputs: Any, **options: Any) -> Tensor:  # type: ignore[override]
        first = next(value for value in (*inputs, *options.values()) if isinstance(value, Tensor) and value.ndim == 5)
        batch, slices = first.shape[0], first.shape[-1]
        flat = [_flat(value) for value in inputs]
        if self.field:
            flat[0] = _in_plane(flat[0])
        named = {name: _flat(value) for name, value in options.items() if name != "spacing"}
        if options.get("spacing") is not None:
            named["spacing"] = torch.as_tensor(options["spacing"])[:, :2].repeat_interleave(slices, 0)
        rows = self.metric._compute_tensor(*flat, **named)
        return nan_mean(rows.unflatten(0, (batch, slices)), 1)


def _flat(value: Any) -> Any:
    """(B, C, X, Y, Z) to (B * Z, C, X, Y); the rest as it is."""
    return value.movedim(-1, 1).flatten(0, 1) if isinstance(value, Tensor) and value.ndim == 5 else value


def _in_plane(field: Tensor) -> Tensor:
    if field.shape[1] != 3 or bool(field[:, 2].any()):
        raise ValueError(
            f"the field of a stack needs 3 components and none along the last axis, got {field.shape[1]} components"
            + (f" and up to {float(field[:, 2].abs().max()):g} voxels" if field.shape[1] == 3 else "")
        )
    return field[:, :2]
