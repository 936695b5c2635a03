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
"""Overlap of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric

__all__ = ["DiceScore", "label_codes", "label_counts", "check_labels", "check_label_maps"]


def check_labels(labels: Sequence[int]) -> tuple[int, ...]:
    """Accept a list of distinct labels.

    Raises:
        ValueError: when it is empty or a label is given twice.
    """
    values = tuple(int(label) for label in labels)
    if not values or len(set(values)) != len(values):
        raise ValueError(f"labels must be distinct and at least one, got {list(labels)}")
    return values


def check_label_maps(**maps: Tensor | None) -> None:
    """Accept label maps (B, 1, \\*S) of one shape, 2-D or 3-D.

    Raises:
        ValueError: when a map has another form or the shapes differ; the message names the maps.
    """
    given = {name: value for name, value in maps.items() if value is not None}
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    for name, value in given.items():
        if value.ndim not in (4, 5) or value.shape[1] != 1:
            raise ValueError(f"{name} must be a label map (B, 1, *S) with 2 or 3 spatial axes, got {shapes[name]}")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"the label maps must have one shape, got {shapes}")


def label_codes(values: Tensor, labels: Sequence[int]) -> Tensor:
    """Replace each label by its place in ``labels``, and anything else by ``len(labels)``; int64."""
    exact = (values.double() if values.is_floating_point() else values.long()).contiguous()
    ordered, order = torch.as_tensor(list(labels), device=values.device, dtype=exact.dtype).sort()
    place = torch.searchsorted(ordered, exact).clamp_max(len(labels) - 1)
    return torch.where(ordered[place] == exact, order[place], len(labels))


def label_counts(codes: Tensor, count: int) -> Tensor:
    """How often each code below ``count`` occurs in each item: (B, ...) to (B, count) float64."""
    flat = codes.reshape(codes.shape[0], -1)
    return torch.stack([torch.bincount(item, minlength=count + 1)[:count] for item in flat]).double()


class DiceScore(RegistrationMetric):
    """Dice overlap ``2 |A and B| / (|A| + |B|)`` per label, from label maps.

    A label that is missing in either map is NaN, as in Learn2Reg. A method that warps a small label out of existence
    would go unpunished that way; give the unwarped ``moving_label`` as third input, and a label that was there before
    warping and is gone after it scores 0 (Learn2Reg's evaluation decides by fixed and moving image too).

    Args:
        labels: the labels to measure, in the order of the columns.

    Example:
        >>> a = torch.tensor([[[[1, 1, 0], [2, 2, 0]]]])
        >>> b = torch.tensor([[[[1, 0, 0], [2, 2, 0]]]])
        >>> DiceScore(labels=[1, 2, 3])(a, b)
        tensor([[0.6667, 1.0000,    nan]])
    """

    def __init__(self, labels: Sequence[int]) -> None:
        super().__init__()
        self.labels = check_labels(labels)
        self.columns = tuple(str(label) for label in self.labels)

    def _compute_tensor(  # type: ignore[override]
        self, moved_label: Tensor, fixed_label: Tensor, moving_label: Tensor | None = None
    ) -> Tensor:
        check_label_maps(moved_label=moved_label, fixed_label=fixed_label)
        count = len(self.labels)
        moved, fixed = label_codes(moved_label, self.labels), label_codes(fixed_label, self.labels)
        both = label_counts(torch.where(moved == fixed, fixed, count), count)
        moved_size, fixed_size = label_counts(moved, count), label_counts(fixed, count)
        before = moved_size if moving_label is None else label_counts(label_codes(moving_label, self.labels), count)
        score = 2 * both / (moved_size + fixed_size).clamp_min(1)
        return score.masked_fill((fixed_size == 0) | (before == 0), float("nan")).float()
