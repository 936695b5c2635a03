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
"""Kullback-Leibler divergence between Gaussians that networks predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, full_precision

Levels: TypeAlias = Tensor | Sequence[Tensor]


class GaussianKL(nn.Module):
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))), elementwise, averaged.

    Half of (v' - v) + exp(v - v') + (m - m')² exp(-v') - 1 with log-variances v, v'. Lists of tensors, one a level of
    a pyramid, are averaged level by level with equal weight. The published pretraining code reads the same head as a
    log-variance when it samples and as a log-standard-deviation here; this loss has the one reading, log-variance, so
    the published weight of 1e-7 becomes about 2.2e-3 for the same force at the initial log-variance of -10.

    Args:
        limits: log-variances are clamped to this range, outside which their exponentials leave float32.

    Raises:
        ValueError: when ``limits`` do not rise.
    """

    def __init__(self, limits: tuple[float, float] = (-30.0, 30.0)) -> None:
        super().__init__()
        self.low, self.high = (float(limit) for limit in limits)
        if not self.low < self.high:
            raise ValueError(f"GaussianKL: limits must rise, got {tuple(limits)}")

    def forward(
        self,
        mean: Levels,
        log_variance: Levels,
        other_mean: Levels | None = None,
        other_log_variance: Levels | None = None,
    ) -> Tensor:
        """The mean divergence in nats.

        Args:
            mean: a tensor of any shape, or a list of them.
            log_variance: the same.
            other_mean: the Gaussian to compare with; a single tensor serves every level. Standard normal without it.
            other_log_variance: its log-variance; given exactly when ``other_mean`` is.

        Returns:
            a scalar, not negative up to rounding.

        Raises:
            ValueError: when shapes or numbers of levels differ, or half of the other Gaussian is missing.
        """
        if (other_mean is None) != (other_log_variance is None):
            raise ValueError("GaussianKL: give both other_mean and other_log_variance, or neither")
        means, logs = _levels(mean), _levels(log_variance)
        others = [None] * len(means) if other_mean is None else _levels(other_mean, len(means))
        other_logs = [None] * len(means) if other_log_variance is None else _levels(other_log_variance, len(means))
        if not means or not len(means) == len(logs) == len(others) == len(other_logs):
            counts = f"{len(means)} means, {len(logs)} log-variances, {len(others)} and {len(other_logs)} of the other"
            raise ValueError(f"GaussianKL: levels differ: {counts}")
        levels = [self._one(*level) for level in zip(means, logs, others, other_logs, strict=True)]
        return torch.stack(levels).mean()

    def _one(self, mean: Tensor, log: Tensor, other: Tensor | None, other_log: Tensor | None) -> Tensor:
        """The mean divergence of one level."""
        for role, tensor in (("log_variance", log), ("other_mean", other), ("other_log_variance", other_log)):
            if tensor is not None and tensor.shape != mean.shape:
                raise ValueError(
                    f"GaussianKL: {role} has shape {tuple(tensor.shape)} but mean has shape {tuple(mean.shape)}"
                )
        with full_precision(mean.device):
            mean, log = as_float(mean), as_float(log).clamp(self.low, self.high)
            other = torch.zeros_like(mean) if other is None else as_float(other)
            other_log = torch.zeros_like(log) if other_log is None else as_float(other_log).clamp(self.low, self.high)
            gap = log - other_log
            # expm1(gap) - gap is exp(gap) - 1 - gap without cancelling when the variances are close.
            return 0.5 * (torch.expm1(gap) - gap + (mean - other).square() * torch.exp(-other_log)).mean()


def _levels(value: Levels, count: int = 1) -> list[Tensor]:
    """A list of levels: one tensor stands for ``count`` equal ones."""
    return [value] * count if isinstance(value, Tensor) else list(value)
