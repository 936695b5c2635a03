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
"""Stacks of slices that are registered one by one, as in short-axis cine: thick, and acquired in different breaths."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    Randomizable,
    ResizeWithPadOrCropd,
    Spacingd,
    Transform,
)
from torch import Tensor

from common.transforms.preprocessing import CheckScand, ScalePercentilesd, scan_transforms

__all__ = ["CompleteSlices", "RandSlice", "ScaleSlicesd", "SelectSlicesd", "cohort_transforms", "stack_transforms"]


def cohort_transforms(
    keys: Sequence[str],
    spatial_size: Sequence[int],
    stacks: bool = False,
    spacing: Sequence[float] | None = None,
    slices: Sequence[float] | None = None,
    padding: str = "zeros",
    allow_missing_keys: bool = False,
    orientation: str | None = "RAS",
) -> Compose:
    """The transform of one subject, whether its scans are images, volumes or stacks of slices.

    Args:
        keys: entries of an item that hold file names.
        spatial_size: of what the network sees: two numbers for stacks.
        stacks: whether scans are stacks; see :func:`stack_transforms`, else :func:`common.transforms.scan_transforms`.
        spacing: to resample to, in mm an axis of ``spatial_size``.
        slices: which slices of a stack, as parts of its height; None is all.
        padding: beyond the frame, "zeros" or "border".
        allow_missing_keys: whether items may lack some keys.
        orientation: axis codes to turn images and volumes to; stacks keep the axes of the file.

    Returns:
        a transform of dictionaries.

    Raises:
        ValueError: for ``slices`` of what is no stack, or as the two functions do.
    """
    if stacks:
        return stack_transforms(keys, spatial_size, spacing, slices, padding, allow_missing_keys)
    if slices is not None:
        raise ValueError(f"slices {list(slices)} can be taken from stacks only; this cohort has none")
    return scan_transforms(
        keys, spatial_size, orientation, spacing, allow_missing_keys=allow_missing_keys, padding=padding
    )


def stack_transforms(
    keys: Sequence[str],
    spatial_size: Sequence[int],
    spacing: Sequence[float] | None = None,
    slices: Sequence[float] | None = None,
    padding: str = "zeros",
    allow_missing_keys: bool = False,
    load: bool = True,
) -> Compose:
    """Load, resample in plane, crop, window each slice by itself and pad stacks (X, Y, Z).

    Axes keep the order of the file, since slices of oblique stacks lie along its last axis. Each slice is windowed
    within the crop and before it is padded, so that neither what is cut off nor what is added counts.

    Args:
        keys: entries of an item that hold file names; those with "label" or "mask" in their name are label maps.
        spatial_size: (X, Y) of the result.
        spacing: in-plane voxel size to resample to, in mm; None leaves it.
        slices: parts of the height, in [0, 1): slice ``int(part * Z)`` of each; None is all.
        padding: beyond the frame of an image, "zeros" or "border"; label maps get 0.
        allow_missing_keys: whether items may lack some keys.
        load: False where entries are MetaTensors (1, X, Y, Z) and no files.

    Returns:
        a transform of dictionaries: images (1, X, Y, Z) float32 in [0, 1], label maps (1, X, Y, Z) int32.

    Raises:
        ValueError: for a size or spacing that is not of a plane, or an unknown padding.
    """
    if len(spatial_size) != 2 or (spacing is not None and len(spacing) != 2):
        raise ValueError(f"slices need two numbers each, got spatial_size {spatial_size} and spacing {spacing}")
    if padding not in ("zeros", "border"):
        raise ValueError(f"padding must be 'zeros' or 'border', got {padding!r}")
    missing: dict[str, Any] = {"allow_missing_keys": allow_missing_keys}
    labels = [key for key in keys if "label" in key or "mask" in key]
    images = [key for key in keys if key not in labels]
    both, plane = [*images, *labels], (*spatial_size, -1)
    steps: list[Any] = []
    if load:
        steps += [LoadImaged(both, image_only=True, **missing), EnsureChannelFirstd(both, **missing)]
    steps += [CheckScand(both, label_keys=labels, **missing), SelectSlicesd(both, slices, **missing)]
    for group, mode, edge, dtype in (
        (images, "bilinear", "constant" if padding == "zeros" else "edge", torch.float32),
        (labels, "nearest", "constant", torch.int32),
    ):
        if not group:
            continue
        if spacing is not None:
            # Not a number: the distance of slices stays.
            pixdim = (*spacing, float("nan"))
            steps += [Spacingd(group, pixdim=pixdim, mode=mode, padding_mode="border", **missing)]
        steps += [CenterSpatialCropd(group, roi_size=plane, **missing)]
        steps += [ScaleSlicesd(group, **missing)] if dtype is torch.float32 else []
        steps += [ResizeWithPadOrCropd(group, spatial_size=plane, mode=edge, **missing)]
        steps += [EnsureTyped(group, dtype=dtype, **missing)]
    return Compose(steps)


class SelectSlicesd(MapTransform):
    """Keep some slices of a stack, by their relative height; refuse what is no stack.

    Args:
        keys: entries, each (C, X, Y, Z).
        parts: in [0, 1), each the slice ``int(part * Z)``; None keeps all.
        allow_missing_keys: whether items may lack some keys.

    Raises:
        ValueError: for a part outside [0, 1).
    """

    def __init__(self, keys: Sequence[str], parts: Sequence[float] | None, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if parts is not None and (not parts or not all(0 <= part < 1 for part in parts)):
            raise ValueError(f"slices must be parts of the height in [0, 1), got {list(parts)}")
        self.parts = None if parts is None else sorted(parts)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with (C, X, Y, slices) entries.

        Raises:
            ValueError: when an entry has no third axis.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            scan = item[key]
            if scan.ndim != 4:
                name = getattr(scan, "meta", {}).get("filename_or_obj", "not from a file")
                raise ValueError(f"'{key}' ({name}) must be a stack (X, Y, Z), got size {tuple(scan.shape[1:])}")
            if self.parts is not None:
                item[key] = self._select(scan)
        return item

    def _select(self, scan: Any) -> MetaTensor:
        assert self.parts is not None
        chosen = list(dict.fromkeys(int(part * scan.shape[-1]) for part in self.parts))
        affine = torch.as_tensor(scan.affine).clone()
        affine[:3, 3] = affine[:3, 3] + chosen[0] * affine[:3, 2]
        if len(chosen) > 1:
            affine[:3, 2] = affine[:3, 2] * (chosen[-1] - chosen[0]) / (len(chosen) - 1)
        meta = {name: value for name, value in scan.meta.items() if name != "affine"}
        return MetaTensor(torch.as_tensor(scan)[..., chosen], affine=affine, meta=meta)


class ScaleSlicesd(ScalePercentilesd):
    """Bring two percentiles of each slice of a stack to 0 and 1, clipped. A constant slice becomes 0.

    Args:
        keys: entries, each (1, X, Y, Z).
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
        allow_missing_keys: whether items may lack some keys.
    """

    def __init__(
        self, keys: Sequence[str], lower: float = 0.05, upper: float = 99.95, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, lower, upper, allow_missing_keys)

    def _scale(self, image: Tensor) -> Tensor:
        scaled = image.clone()
        for index in range(image.shape[-1]):
            scaled[..., index] = super()._scale(image[..., index])
        return scaled


class RandSlice(Randomizable, Transform):
    """One slice of a pair of stacks, any with the same chance: what a 2-D network trains on.

    Every tensor (C, X, Y, Z) of the item becomes (C, X, Y); affines keep the in-plane voxel size.
    """

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Draw a slice.

        Raises:
            ValueError: when the two stacks have different heights.
        """
        heights = {role: int(item[role].shape[-1]) for role in ("moving", "fixed")}
        if len(set(heights.values())) > 1:
            raise ValueError(f"{item.get('moving_id')} and {item.get('fixed_id')} must have as many slices: {heights}")
        index = int(self.R.randint(heights["fixed"]))
        return {key: _slice(key, value, index) for key, value in item.items()}


def _slice(key: str, value: Any, index: int) -> Any:
    if key.endswith("_affine"):
        lengths = value[:3, :2].norm(dim=0)
        return torch.diag(torch.cat([lengths, lengths.new_ones(1)]))
    return value[..., index] if isinstance(value, Tensor) and value.ndim == 4 else value


class CompleteSlices(Transform):
    """Empty the labels of slices in which a structure is missing from either phase.

    At the base and at the apex of a heart a slice may cut a structure in one phase only; its overlap there says nothing
    about the registration. The published evaluation on M&Ms measures complete slices alone.

    Args:
        labels: the structures that have to be there.
        enabled: False changes nothing.
    """

    def __init__(self, labels: Sequence[int], enabled: bool = True) -> None:
        self.labels, self.enabled = tuple(labels), enabled

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Return the item, with new label maps where there are any."""
        keys = ("moving_label", "fixed_label")
        if not self.enabled or not self.labels or any(key not in item for key in keys):
            return dict(item)
        maps = [item[key] for key in keys]
        there = [(labels == value).flatten(0, -2).any(0) for labels in maps for value in self.labels]
        complete = torch.stack(there).all(0)
        return {**item, **{key: item[key] * complete for key in keys}}
