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
"""Images of several channels in a file each, a window of intensities for each channel, and merged labels."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform

__all__ = ["LoadChannelsd", "MapLabelsd", "ScaleWindowsd"]


class LoadChannelsd(MapTransform):
    """Load a file, or a list of files one after the other, as one image with the channels in order.

    ``monai.transforms.LoadImaged`` takes lists too, but its reader (1.6) remembers the names of the last call, so that
    two threads at once lose channels.

    Args:
        keys: entries that hold a path or a list of paths.
        allow_missing_keys: whether items may lack some keys.
    """

    def __init__(self, keys: Sequence[str], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.load, self.channel_first = LoadImage(image_only=True), EnsureChannelFirst()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with (C, *S) MetaTensors placed as their first file is.

        Raises:
            ValueError: when files of one image differ in size or place; names both.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            paths = item[key] if isinstance(item[key], (list, tuple)) else [item[key]]
            scans = [self.channel_first(self.load(path)) for path in paths]
            for path, scan in zip(paths, scans, strict=True):
                same = scan.shape[1:] == scans[0].shape[1:] and np.allclose(scan.affine, scans[0].affine, atol=1e-3)
                if not same:
                    raise ValueError(
                        f"'{key}': the channels {paths[0]} and {path} must lie on one grid, found sizes "
                        f"{tuple(scans[0].shape[1:])} and {tuple(scan.shape[1:])}, affines {scans[0].affine.tolist()} "
                        f"and {scan.affine.tolist()}"
                    )
            values = torch.cat([torch.as_tensor(scan) for scan in scans])
            item[key] = MetaTensor(values, meta=scans[0].meta)
        return item


class ScaleWindowsd(MapTransform):
    """Clip each channel of an image to its window and bring the window's ends to 0 and 1.

    Args:
        keys: entries to scale; each (C, *S).
        windows: (low, high) of each of the C channels.
        allow_missing_keys: whether items may lack some keys.
    """

    def __init__(
        self, keys: Sequence[str], windows: Sequence[tuple[float, float]], allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.windows = tuple(windows)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its images scaled to float32 in [0, 1]."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key].float()
            axes = (len(self.windows), *[1] * (image.ndim - 1))
            low, high = (torch.tensor(ends).view(axes) for ends in zip(*self.windows, strict=True))
            item[key] = (image - low).div_(high - low).clamp_(0.0, 1.0)
        return item


class MapLabelsd(MapTransform):
    """Give label values new numbers, which merges those that get the same; what has no new number becomes 0.

    Args:
        keys: label maps.
        label_map: new value by old value, none of them negative.
        allow_missing_keys: whether items may lack some keys.

    Raises:
        ValueError: for negative values.
    """

    def __init__(self, keys: Sequence[str], label_map: Mapping[int, int], allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if not label_map or min(*label_map, *label_map.values()) < 0:
            raise ValueError(f"label_map needs pairs of values that are not negative, got {dict(label_map)}")
        # One place more than the largest value, for all that lie beyond.
        self.table = torch.zeros(max(label_map) + 2, dtype=torch.int32)
        for old, new in label_map.items():
            self.table[int(old)] = int(new)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its label maps renumbered, int32."""
        item = dict(data)
        for key in self.key_iterator(item):
            label = item[key]
            values = torch.as_tensor(label).long()
            beyond = (values < 0) | (values >= len(self.table))
            mapped = self.table[values.masked_fill(beyond, len(self.table) - 1)]
            item[key] = MetaTensor(mapped, meta=label.meta) if isinstance(label, MetaTensor) else mapped
        return item
