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
"""Soft Dice overlap of label maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, check_ddf, check_images, full_precision, plain
from common.spatial import warp


def one_hot(label: Tensor, labels: Sequence[int]) -> Tensor:
    """One channel for each of ``labels``: 1 where the label map has it, 0 elsewhere.

    Args:
        label: (B, 1, *S) integer or bool (or floating with whole numbers).
        labels: the K values to tell apart.

    Returns:
        (B, K, *S) float32.

    Raises:
        ValueError: when the map has not exactly one channel.
    """
    if label.ndim < 3 or label.shape[1] != 1:
        raise ValueError(f"one_hot: a label map must be (B, 1, *S), got shape {tuple(label.shape)}")
    values = torch.as_tensor(list(labels), device=label.device).view(1, -1, *[1] * (label.ndim - 2))
    return (plain(label) == values).float()


class SoftDice(nn.Module):
    """One minus the mean Dice overlap of label probabilities.

    For each item and label 1 - 2Σpq / (Σp + Σq). A label that neither map holds is left out of the mean, so it neither
    helps nor hurts; when no label is left the loss is 0.

    Args:
        labels: the labels to compare when a map is given as integers (B, 1, *S); such a map has no gradient. Without
            it both maps must be one-hot or probabilities (B, K, *S).
        include_background: whether channel 0 counts. Only asked of one-hot maps: with ``labels`` name those that count.

    Raises:
        ValueError: when ``labels`` is empty or repeats one.
    """

    def __init__(self, labels: Sequence[int] | None = None, include_background: bool = True) -> None:
        super().__init__()
        self.labels = None if labels is None else tuple(int(label) for label in labels)
        if self.labels is not None and (not self.labels or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"SoftDice: labels must be distinct and at least one, got {list(self.labels)}")
        self.include_background = include_background

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """One minus the mean overlap.

        Args:
            moved: (B, K, *S) probabilities, or (B, 1, *S) integers when the labels are named.
            fixed: the same of the fixed image.
            mask: (B or 1, 1, *S), weights of the voxels.

        Returns:
            a scalar in [0, 1], float32 (float64 for float64 maps).

        Raises:
            ValueError: when shapes differ, or integers are given and the labels were not named.
        """
        moved, fixed = self._probabilities(moved, "moved"), self._probabilities(fixed, "fixed")
        check_images("SoftDice", moved, fixed, mask)
        with full_precision(moved.device):
            moved, fixed = as_float(moved), as_float(fixed)
            if self.labels is None and not self.include_background:
                moved, fixed = moved[:, 1:], fixed[:, 1:]
            weights = torch.ones_like(moved[:, :1]) if mask is None else plain(mask).to(moved.dtype)
            moved, fixed = moved.where(weights > 0, 0.0).flatten(2), fixed.where(weights > 0, 0.0).flatten(2)
            weights = weights.flatten(2)
            both = (weights * moved * fixed).sum(2)
            either = (weights * (moved + fixed)).sum(2)
            present = either > 0
            dice = 2 * both / either.where(present, 1.0)
            loss = (1 - dice).where(present, 0.0)
            return loss.sum() / present.sum().clamp_min(1)

    def _probabilities(self, label: Tensor, role: str) -> Tensor:
        """The map as probabilities: integers are told apart by ``labels``."""
        if not isinstance(label, Tensor):
            raise TypeError(f"SoftDice: {role} must be a tensor, got {type(label).__name__}")
        if label.is_floating_point():
            return label
        if self.labels is None:
            raise ValueError(f"SoftDice: {role} holds {label.dtype} labels; name the labels or give it one-hot")
        return one_hot(label, self.labels)


class WarpedLabelDice(nn.Module):
    """:class:`SoftDice` of the fixed labels and the moving labels moved by a field, differentiable in the field.

    Each label is moved as a map of zeros and ones with linear interpolation, so its memory grows with their number.

    Args:
        labels: the labels that count; leave out the background.
        padding: what a voxel gets that is pulled from outside, "border" or "zeros" (no label).

    Raises:
        ValueError: when ``labels`` is empty or repeats one.
    """

    def __init__(self, labels: Sequence[int], padding: str = "border") -> None:
        super().__init__()
        self.dice = SoftDice(labels)
        self.padding = padding

    def forward(self, moving_label: Tensor, fixed_label: Tensor, ddf: Tensor, mask: Tensor | None = None) -> Tensor:
        """One minus the mean overlap.

        Args:
            moving_label: (B, 1, *Sm) integer.
            fixed_label: (B, 1, *S) integer.
            ddf: (B, d, *S), voxels.
            mask: (B or 1, 1, *S), weights of the voxels of the fixed grid.

        Returns:
            a scalar in [0, 1].

        Raises:
            ValueError: when shapes do not fit.
        """
        check_ddf("WarpedLabelDice", ddf)
        assert self.dice.labels is not None
        with full_precision(ddf.device):
            moved = warp(one_hot(moving_label, self.dice.labels), as_float(ddf), padding=self.padding)
            return self.dice(moved, one_hot(fixed_label, self.dice.labels), mask)
