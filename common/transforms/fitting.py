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
"""Bring scans of any size whole onto one grid: pad to its proportions, then resize, images and label maps alike."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor
from torch.nn import functional

__all__ = ["FitWholed", "padded_size"]

_MODES = {2: "bilinear", 3: "trilinear"}


def padded_size(size: Sequence[int], spatial_size: Sequence[int]) -> tuple[int, ...]:
    """The size to pad to before resizing, so that all axes are scaled alike: a cube where the new size is one.

    Args:
        size: of the scan.
        spatial_size: to resize to, at least 2 along each axis.

    Returns:
        a size that is nowhere smaller than the scan's.

    Example:
        >>> padded_size((18, 22, 20), (16, 16, 16))
        (22, 22, 22)
        >>> padded_size((18, 21), (11, 6))
        (41, 21)
    """
    factor = max((n - 1) / (s - 1) for n, s in zip(size, spatial_size, strict=True))
    return tuple(max(n, math.floor(factor * (s - 1) + 1.5)) for n, s in zip(size, spatial_size, strict=True))


class FitWholed(MapTransform):
    """Pad scans alike on both sides to the proportions of a size, then resize them to it; nothing is cut off.

    First and last voxels of the padded scan fall on those of the new grid (align_corners), for label maps too, whose
    nearest neighbour is sought at the same places. The affine follows, so that millimetres stay millimetres. Where the
    missing voxels are an odd number, the end of an axis gets one more.

    Args:
        keys: entries to fit; each a MetaTensor (C, *S), all of one item on one grid.
        spatial_size: the new size, at least 2 along each axis.
        label_keys: which of them are label maps.
        padding: "constant" (0) or "edge", of images; label maps always get 0.
        allow_missing_keys: whether items may lack some keys.

    Raises:
        ValueError: when the size has fewer than 2 voxels along an axis.
    """

    def __init__(
        self,
        keys: Sequence[str],
        spatial_size: Sequence[int],
        label_keys: Sequence[str] = (),
        padding: str = "constant",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_size = tuple(int(n) for n in spatial_size)
        if min(self.spatial_size) < 2:
            raise ValueError(f"spatial_size must be at least 2 along each axis to resize to, got {self.spatial_size}")
        self.label_keys, self.padding = tuple(label_keys), padding

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with scans (C, *spatial_size), of their own dtype, images as float32.

        Raises:
            ValueError: when a scan has another number of axes than the size.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self._fitted(item[key], key in self.label_keys)
        return item

    def _fitted(self, scan: MetaTensor, label: bool) -> MetaTensor:
        size, values = tuple(scan.shape[1:]), scan.as_tensor()
        if len(size) != len(self.spatial_size):
            raise ValueError(f"a scan of size {size} cannot be resized to {self.spatial_size}")
        whole = padded_size(size, self.spatial_size)
        before = [(w - n) // 2 for w, n in zip(whole, size, strict=True)]
        after = [w - n - b for w, n, b in zip(whole, size, before, strict=True)]
        step = [(w - 1) / (s - 1) for w, s in zip(whole, self.spatial_size, strict=True)]
        values = self._padded(values if label else values.float(), before, after, label)
        if label:
            values = _nearest(values, self.spatial_size, step)
        else:
            mode = _MODES[len(size)]
            values = functional.interpolate(values[None], self.spatial_size, mode=mode, align_corners=True)[0]
        meta = {name: value for name, value in scan.meta.items() if name != "affine"}
        return MetaTensor(values, affine=_moved(scan.affine, before, step), meta=meta)

    def _padded(self, values: Tensor, before: Sequence[int], after: Sequence[int], label: bool) -> Tensor:
        if not any(before) and not any(after):
            return values
        around = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        if label or self.padding == "constant":
            return functional.pad(values, around)
        return functional.pad(values[None], around, mode="replicate")[0]


def _nearest(values: Tensor, size: Sequence[int], step: Sequence[float]) -> Tensor:
    """The voxels nearest to where the new grid samples; of two equally near ones the later."""
    for axis, (n, h) in enumerate(zip(size, step, strict=True), start=1):
        places = torch.floor(torch.arange(n, dtype=torch.float64) * h + 0.5).long()
        values = values.index_select(axis, places.clamp_max(values.shape[axis] - 1).to(values.device))
    return values


def _moved(affine: Any, before: Sequence[int], step: Sequence[float]) -> Tensor:
    """The affine of the new grid: its voxel i lies at voxel ``i * step - before`` of the scan."""
    old = np.asarray(affine, dtype=np.float64)
    new = np.eye(len(old))
    dims = len(step)
    new[range(dims), range(dims)] = step
    new[:dims, -1] = [-float(b) for b in before]
    return torch.from_numpy(old @ new)
