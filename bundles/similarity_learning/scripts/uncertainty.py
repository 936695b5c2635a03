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
"""What samples of a field say of its certainty: where a voxel comes from, and which label reaches it.

Samples are those of q(v), each integrated to a field of its own. They come as antithetic pairs about the mean, so that
squared deviations divided by their number (not by one less) are an unbiased variance as long as fields are linear in
the velocity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.metrics.overlap import check_labels, label_codes
from common.spatial import warp_labels

__all__ = [
    "displacement_std",
    "label_disagreement",
    "label_entropy",
    "label_probabilities",
    "label_std",
    "total_std",
]


def displacement_std(ddf_samples: Tensor) -> Tensor:
    """The standard deviation of each component of the displacement.

    Args:
        ddf_samples: (B, K, d, *S), K fields for each pair, voxels.

    Returns:
        (B, d, *S), voxels.

    Raises:
        ValueError: when there are fewer than two samples or the shape is another.
    """
    _check_samples(ddf_samples)
    return ddf_samples.float().std(dim=1, correction=0)


def total_std(ddf_std: Tensor, spacing: Tensor | None = None) -> Tensor:
    """The root of the summed variances of all components: how far off a voxel is expected to come from.

    Args:
        ddf_std: (B, d, *S), voxels.
        spacing: (B, d), mm per voxel along each axis; voxels without it.

    Returns:
        (B, 1, *S), voxels or mm.
    """
    std = ddf_std.float()
    if spacing is not None:
        std = std * spacing.to(std).view(*std.shape[:2], *[1] * (std.ndim - 2))
    return std.square().sum(1, keepdim=True).sqrt()


def label_probabilities(moving_label: Tensor, ddf_samples: Tensor, labels: Sequence[int]) -> Tensor:
    """The share of the samples that bring each label to a voxel.

    Every sample moves the label map as a registration does (the label of the greatest share in the linear
    interpolation), so a field without uncertainty gives probabilities of 0 and 1 alone.

    Args:
        moving_label: (B, 1, *Sm), integers.
        ddf_samples: (B, K, d, *S), voxels.
        labels: those that count; anything else is background, whose probability is what is missing from 1.

    Returns:
        (B, len(labels), *S), float32.

    Raises:
        ValueError: when labels repeat, or shapes do not fit.
    """
    values = check_labels(labels)
    _check_samples(ddf_samples, least=1)
    count = ddf_samples.shape[1]
    shares = torch.zeros(len(moving_label), len(values), *ddf_samples.shape[3:], device=ddf_samples.device)
    for sample in ddf_samples.unbind(1):
        codes = label_codes(warp_labels(moving_label, sample), values)
        for place in range(len(values)):
            shares[:, place] += codes[:, 0] == place
    return shares / count


def label_std(probabilities: Tensor) -> Tensor:
    """The standard deviation of the label that reaches a voxel.

    The root of half the summed variances of the indicators of all labels and of the background; half, as what one label
    wins another loses. With a single label it is the standard deviation of its indicator; at most 0.5 then, and below
    0.71 always.

    Args:
        probabilities: (B, L, *S), as from :func:`label_probabilities`.

    Returns:
        (B, 1, *S).
    """
    rest = _background(probabilities)
    squares = probabilities.square().sum(1, keepdim=True) + rest.square()
    return (0.5 * (1 - squares)).clamp_min(0).sqrt()


def label_disagreement(label_maps: Tensor) -> Tensor:
    """:func:`label_std` of the label maps that the samples have moved, whatever labels there are.

    The squared probabilities of all labels add up to the share of pairs of samples that agree, so that nothing as large
    as one map a label is made.

    Args:
        label_maps: (K, ...), one map for each sample.

    Returns:
        (...), float32.
    """
    count = len(label_maps)
    differ = torch.zeros(label_maps.shape[1:], dtype=torch.int32, device=label_maps.device)
    for k in range(1, count):
        differ += (label_maps[k] != label_maps[:k]).sum(0, dtype=torch.int32)
    return (differ.float() / count**2).sqrt()


def label_entropy(probabilities: Tensor) -> Tensor:
    """The entropy in nats of the label that reaches a voxel.

    Args:
        probabilities: (B, L, *S), as from :func:`label_probabilities`.

    Returns:
        (B, 1, *S).
    """
    rest = _background(probabilities)
    return torch.special.entr(probabilities).sum(1, keepdim=True) + torch.special.entr(rest)


def _background(probabilities: Tensor) -> Tensor:
    return (1 - probabilities.sum(1, keepdim=True)).clamp(0, 1)


def _check_samples(ddf_samples: Tensor, least: int = 2) -> None:
    dims = ddf_samples.ndim - 3
    if dims not in (2, 3) or ddf_samples.shape[2] != dims or ddf_samples.shape[1] < least:
        raise ValueError(
            f"ddf_samples must be (B, K, d, *S) with d = 2 or 3 and K of at least {least}, "
            f"got {tuple(ddf_samples.shape)}"
        )
