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
"""From the files of a pair to what a network sees: both scans on one grid that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.transforms import Compose, Transform

from common.io import pair_grid
from common.io.label_maps import label_values, require_label_map
from common.transforms.preprocessing import scan_transforms
from common.transforms.stacks import stack_transforms

__all__ = ["LoadScanPaird"]


class LoadScanPaird(Transform):
    """Load the scans of a pair, each pair on a grid of its own.

    Size and spacing of that grid follow from the pair's two headers (:func:`common.io.pair_grid`); the rest is the
    standard preprocessing with the options below. Volumes are turned to RAS, slices and stacks are left as they lie.

    Args:
        intensity: as for :func:`common.transforms.scan_transforms`; stacks are windowed slice by slice whatever it is.
        padding: beyond a scan, ``"zeros"`` or ``"border"``.
        stacks: whether scans are stacks of slices that are registered one by one.
        label_map: what each value of label maps becomes, see :func:`common.transforms.scan_transforms`.
    """

    def __init__(
        self,
        intensity: str | Sequence[float] = "percentile",
        padding: str = "zeros",
        stacks: bool = False,
        label_map: Mapping[int, int] | None = None,
    ) -> None:
        self.intensity, self.padding, self.stacks, self.label_map = intensity, padding, stacks, label_map
        self._steps(["moving"], [1, 1], None)  # Options that are wrong are so for every pair: say it now.

    def __call__(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Replace files by what they hold.

        Args:
            pair: files ``moving`` and ``fixed``; ``moving_label`` and ``fixed_label`` are loaded where both are there.

        Returns:
            the pair with MetaTensors in place of these, images (1, *S) float32 and label maps (1, *S) int32.

        Raises:
            FileNotFoundError, ScanError: for a file that is missing or cannot be read.
            ValueError: for two scans that cannot be registered, or a label map that is none or lies elsewhere.
        """
        grid = pair_grid(pair["moving"], pair["fixed"], self.stacks)
        labels = [role for role in ("moving", "fixed") if pair.get(f"{role}_label")]
        for role in labels:
            require_label_map(pair[role], pair[f"{role}_label"])
        keys = ["moving", "fixed"]
        if len(labels) == 2:
            keys += ["moving_label", "fixed_label"]
            for key in keys[2:]:
                label_values(pair[key])
        loaded = self._steps(keys, grid["spatial_size"], grid["spacing"])({key: pair[key] for key in keys})
        return {**pair, **loaded}

    def _steps(self, keys: Sequence[str], size: Sequence[int], spacing: Sequence[float] | None) -> Compose:
        if self.stacks:
            return stack_transforms(keys, size, spacing, padding=self.padding)
        return scan_transforms(
            keys,
            size,
            orientation="RAS" if len(size) == 3 else None,
            spacing=spacing,
            intensity=self.intensity,
            padding=self.padding,
            label_map=self.label_map,
        )
