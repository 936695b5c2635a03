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
"""What every function here agrees on: plain tensors, at least float32, shapes checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.spatial.exporting import exporting

__all__ = ["as_field", "check_batch", "identity_grid", "plain"]


def identity_grid(
    shape: Sequence[int], *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Voxel coordinates of every voxel: entry ``[k, i, j, ...]`` is the k-th of ``(i, j, ...)``.

    Args:
        shape: spatial size, of any number of axes.
        device: where to make it.
        dtype: of the coordinates.

    Returns:
        a tensor (d, *shape).
    """
    axes = [torch.arange(size, device=device, dtype=dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def plain(tensor: Tensor) -> Tensor:
    """The same data as a plain ``torch.Tensor``.

    A MONAI ``MetaTensor`` carries an affine; a moved image lives on another grid, so keeping the affine would be wrong.
    """
    # A recording has tensors of a type of its own, which must stay as they are.
    return tensor if type(tensor) is Tensor or exporting() else tensor.as_subclass(Tensor)


def as_field(field: Tensor, name: str = "ddf") -> Tensor:
    """Check the shape of a field and raise half precision to float32 (float64 stays, for checks of gradients).

    Args:
        field: (B, d, *S) with d = len(S) in (2, 3).
        name: what to call it in an error.

    Returns:
        the field, float32 or float64.

    Raises:
        ValueError: when the shape is not (B, d, *S).
    """
    dims = field.dim() - 2
    if dims not in (2, 3) or field.shape[1] != dims:
        raise ValueError(f"{name} must be (B, 2, H, W) or (B, 3, H, W, D), got {tuple(field.shape)}")
    field = plain(field)
    return field if field.dtype in (torch.float32, torch.float64) else field.float()


def check_batch(image: Tensor, ddf: Tensor, name: str = "image") -> None:
    """Check that an image (B, C, *Sm) and a field (B, d, *Sf) go together.

    Raises:
        ValueError: when the batch sizes or the numbers of axes differ; it names both shapes.
    """
    if image.dim() != ddf.dim() or image.shape[0] != ddf.shape[0]:
        raise ValueError(
            f"{name} (B, C, *Sm) and ddf (B, d, *Sf) must agree in batch size and number of axes, "
            f"got {tuple(image.shape)} and {tuple(ddf.shape)}"
        )
