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
"""What every loss asks of its arguments, and the precision it computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial.grid import plain as plain


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which autocast leaves tensors on ``device`` alone: half precision loses small differences."""
    return torch.autocast(device_type=device.type, enabled=False)


def as_float(tensor: Tensor) -> Tensor:
    """The plain tensor as float32, or in float64 when it is that."""
    tensor = plain(tensor)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_images(name: str, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> None:
    """Refuse images that are no (B, C, *S) pair of one shape, and a mask that does not fit them.

    Args:
        name: the loss that asks, for the message.
        moved: (B, C, *S).
        fixed: (B, C, *S).
        mask: (B or 1, C or 1, *S), where the images count.

    Raises:
        TypeError: when an argument is no tensor.
        ValueError: when shapes differ; the message has both.
    """
    for role, tensor in (("moved", moved), ("fixed", fixed)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {role} must be a tensor, got {type(tensor).__name__}")
    if moved.shape != fixed.shape:
        raise ValueError(f"{name}: moved has shape {tuple(moved.shape)} but fixed has shape {tuple(fixed.shape)}")
    if moved.ndim < 3:
        raise ValueError(f"{name}: images must be (B, C, *S), got shape {tuple(moved.shape)}")
    if moved.numel() == 0:
        raise ValueError(f"{name}: images of shape {tuple(moved.shape)} hold no voxel")
    if mask is not None:
        check_mask(name, mask, moved.shape)


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask that is not (B or 1, C or 1, *S) of ``shape``.

    Raises:
        TypeError: when the mask is no tensor.
        ValueError: when it does not broadcast over batch and channels to ``shape``.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a tensor, got {type(mask).__name__}")
    fits = mask.ndim == len(shape) and tuple(mask.shape[2:]) == tuple(shape[2:])
    if not fits or mask.shape[0] not in (1, shape[0]) or mask.shape[1] not in (1, shape[1]):
        raise ValueError(f"{name}: mask has shape {tuple(mask.shape)} but the images have shape {tuple(shape)}")


def check_ddf(name: str, ddf: Tensor) -> int:
    """Refuse anything but a displacement field (B, d, *S) with d spatial axes; return d.

    Raises:
        TypeError: when ``ddf`` is no tensor.
        ValueError: when the number of channels is not the number of spatial axes.
    """
    if not isinstance(ddf, Tensor):
        raise TypeError(f"{name}: ddf must be a tensor, got {type(ddf).__name__}")
    if ddf.ndim not in (4, 5) or ddf.shape[1] != ddf.ndim - 2:
        raise ValueError(f"{name}: ddf must be (B, 2, H, W) or (B, 3, H, W, D), got shape {tuple(ddf.shape)}")
    if ddf.numel() == 0:
        raise ValueError(f"{name}: ddf of shape {tuple(ddf.shape)} holds no voxel")
    return ddf.shape[1]


def check_spacing(name: str, spacing: Sequence[float] | float | None) -> tuple[float, ...] | None:
    """The voxel size as a tuple: one number stands for every axis.

    Raises:
        ValueError: when a size is not a positive number.
    """
    if spacing is None:
        return None
    sizes = (float(spacing),) if isinstance(spacing, (int, float)) else tuple(float(size) for size in spacing)
    if not sizes or not all(0.0 < size < float("inf") for size in sizes):
        raise ValueError(f"{name}: spacing must be positive numbers, got {spacing}")
    return sizes


def spacing_for(name: str, spacing: tuple[float, ...] | None, spatial_dims: int) -> tuple[float, ...]:
    """The voxel size of each of ``spatial_dims`` axes, 1 when none was given.

    Raises:
        ValueError: when the number of sizes is neither 1 nor ``spatial_dims``.
    """
    if spacing is None:
        return (1.0,) * spatial_dims
    if len(spacing) == 1:
        return spacing * spatial_dims
    if len(spacing) != spatial_dims:
        raise ValueError(f"{name}: spacing {spacing} has {len(spacing)} numbers but ddf has {spatial_dims} axes")
    return spacing


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``values`` weighted by ``mask`` (broadcast); 0, with zero gradient, where the mask is empty.

    Values outside the mask must be finite: 0 times NaN is NaN.
    """
    if mask is None:
        return values.mean()
    weights = plain(mask).to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp_min(torch.finfo(values.dtype).tiny)


def check_choice(name: str, option: str, value: str, choices: Sequence[str]) -> str:
    """The value, when it is one of ``choices``.

    Raises:
        ValueError: when it is not; names what there is.
    """
    if value not in choices:
        raise ValueError(f"{name}: {option} must be one of {list(choices)}, got {value!r}")
    return value


def check_positive(name: str, option: str, value: float) -> float:
    """The value as a float, when it is a positive finite number.

    Raises:
        ValueError: when it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: {option} must be a positive number, got {value!r}")
    return float(value)
