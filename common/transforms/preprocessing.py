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
"""From a file to a network's input: the standard preprocessing of scans and their label maps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    Orientationd,
    ResizeWithPadOrCropd,
    ScaleIntensityd,
    Spacingd,
)
from torch import Tensor

from common.io.scans import affine_3d, in_plane_affine
from common.transforms.channels import LoadChannelsd, MapLabelsd, ScaleWindowsd
from common.transforms.fitting import FitWholed

__all__ = ["CheckScand", "ScalePercentilesd", "SliceAsPlaned", "scan_transforms"]

# What a window keeps of CT, in Hounsfield units. Lungs: from air to the upper end of the window that radiologists look
# at lungs with (width 1500, level -600); its lower end, -1350, lies below air, where nothing is. Abdomen: the soft
# tissue window (width 400, level 40).
WINDOWS = {"ct_lung": (-1000.0, 150.0), "ct_abdomen": (-160.0, 240.0)}
INTENSITIES = ("percentile", "minmax", "none", "mri", *WINDOWS)
FITS = ("pad", "resize")
_PADDINGS = {"zeros": "constant", "border": "edge"}


def scan_transforms(
    keys: Sequence[str] = ("image", "label"),
    spatial_size: Sequence[int] | None = None,
    orientation: str | None = "RAS",
    spacing: Sequence[float] | None = None,
    intensity: str | Sequence[float] | Sequence[Sequence[float]] = "percentile",
    label_keys: Sequence[str] | None = None,
    allow_missing_keys: bool = False,
    padding: str = "zeros",
    channels: int = 1,
    label_map: Mapping[int, int] | None = None,
    fit: str = "pad",
    load: bool = True,
) -> Compose:
    """Load, orient, resample, window and pad scans, 2-D or 3-D, in the file formats that MONAI reads.

    The results are MetaTensors whose affine belongs to the processed grid; ``meta["original_affine"]`` is the file's,
    so that what is found on the processed grid can be brought back to the scan.

    Args:
        keys: entries of an item that hold file names.
        spatial_size: pad with zeros or crop to this size, alike on both sides; None keeps the size. Two numbers make
            2-D images of volumes with one slice.
        orientation: axis codes to flip and permute the axes to; None leaves them.
            For 2-D scans the first two count; MONAI says so in a warning unless ``spatial_size`` has two entries.
        spacing: voxel size to resample to, in millimetres, linear for images and nearest for labels; None leaves it.
        intensity: "percentile" brings percentiles 0.5 and 99.5 to 0 and 1, clipped; "minmax" brings minimum and
            maximum there; "none" keeps the values. Two numbers are a window: values are clipped to it, and its ends
            brought to 0 and 1, as for CT in Hounsfield units. A constant image becomes 0 in the first two. A list of
            windows has one for each channel. "mri" is "percentile"; "ct_lung" is the window -1000 to 150 HU, and
            "ct_abdomen" -160 to 240 HU.
        label_keys: which of the keys are label maps; None is those whose name contains "label" or "mask".
        allow_missing_keys: whether items may lack some keys.
        padding: "zeros", or "border" to repeat an image's outermost voxels. Where scans are cut out of larger ones,
            zeros draw a frame around each that a network then aligns, though it is no anatomy. Label maps always get 0.
        channels: of every image, such as 2 for CT and PET of one body; an item then has a list of files, one a channel,
            or a file with channels as its last axis. "percentile" and "minmax" scale each channel by itself.
        label_map: what each value of the label maps becomes; values that it does not name become 0. None or empty
            leaves them.
        fit: how a scan comes to ``spatial_size``. "pad" pads or crops it; "resize" pads it to the proportions of the
            new size and then resizes it, so that nothing is cut off (:class:`common.transforms.FitWholed`).
            Intensities are scaled after that, as published for similarity learning, padding included.
        load: False where entries are MetaTensors (channels, *S) and no files.

    Returns:
        a transform of dictionaries: images (channels, *S) float32, label maps (1, *S) int32.

    Raises:
        ValueError: when ``intensity``, ``padding`` or ``fit`` is unknown, there is not a window for each channel, or a
            label key is not among the keys.
    """
    if isinstance(intensity, str) and intensity not in INTENSITIES:
        raise ValueError(f"intensity must be one of {INTENSITIES} or a window (low, high), got {intensity!r}")
    window = intensity_window(intensity)
    windows = None if window is None else _windows(window, channels)
    if padding not in _PADDINGS:
        raise ValueError(f"padding must be one of {sorted(_PADDINGS)}, got {padding!r}")
    if fit not in FITS or (fit == "resize" and spatial_size is None):
        raise ValueError(f"fit must be one of {FITS}, and 'resize' needs a spatial_size, got {fit!r}, {spatial_size}")
    if label_keys is None:
        label_keys = [key for key in keys if "label" in key or "mask" in key]
    elif not set(label_keys) <= set(keys):
        raise ValueError(f"label_keys {list(label_keys)} must be among the keys {list(keys)}")
    labels = list(label_keys)
    images = [key for key in keys if key not in labels]
    both = images + labels
    missing: dict[str, Any] = {"allow_missing_keys": allow_missing_keys}
    steps: list[Any] = []
    if load and channels > 1:
        steps += [LoadChannelsd(both, **missing)]
    elif load:
        steps += [LoadImaged(both, image_only=True, **missing), EnsureChannelFirstd(both, **missing)]
    if spatial_size is not None and len(spatial_size) == 2:
        steps += [SliceAsPlaned(both, **missing)]
    steps += [CheckScand(both, label_keys=labels, channels=channels, **missing)]
    if orientation is not None:
        codes = orientation[: len(spatial_size)] if spatial_size is not None else orientation
        # These are MONAI's own labels, spelled out because leaving them to the metadata is about to become the default.
        steps += [Orientationd(both, axcodes=codes, labels=(("L", "R"), ("P", "A"), ("I", "S")), **missing)]
    if spacing is not None:
        steps += [Spacingd(images, pixdim=spacing, mode="bilinear", padding_mode="border", **missing)] if images else []
        steps += [Spacingd(labels, pixdim=spacing, mode="nearest", padding_mode="border", **missing)] if labels else []
    if fit == "resize" and spatial_size is not None:
        steps += [FitWholed(both, spatial_size, labels, _PADDINGS[padding], **missing)]
    if windows is not None and images:
        steps += [ScaleWindowsd(images, windows, **missing)]
    elif intensity in ("percentile", "mri") and images:
        steps += [ScalePercentilesd(images, **missing)]
    elif intensity == "minmax" and images:
        steps += [ScaleIntensityd(images, minv=0.0, maxv=1.0, channel_wise=True, **missing)]
    mapped = [key for key in labels if "label" in key]
    steps += [MapLabelsd(mapped, label_map, **missing)] if label_map and mapped else []
    if spatial_size is not None and fit == "pad":
        size = {"spatial_size": tuple(spatial_size), **missing}
        steps += [ResizeWithPadOrCropd(images, mode=_PADDINGS[padding], **size)] if images else []
        steps += [ResizeWithPadOrCropd(labels, mode="constant", **size)] if labels else []
    steps += [EnsureTyped(images, dtype=torch.float32, **missing)] if images else []
    steps += [EnsureTyped(labels, dtype=torch.int32, **missing)] if labels else []
    return Compose(steps)


def intensity_window(intensity: str | Sequence[Any]) -> Sequence[Any] | None:
    """The window or windows that an ``intensity`` of :func:`scan_transforms` stands for, None if it is none."""
    return WINDOWS.get(intensity) if isinstance(intensity, str) else intensity


def _windows(values: Sequence[Any], channels: int) -> list[tuple[float, float]]:
    """One window for each channel; a lone one is for all of them."""
    one = all(isinstance(value, (int, float)) for value in values)
    windows = [_window(values)] * channels if one else [_window(window) for window in values]
    if len(windows) != channels:
        raise ValueError(f"{channels} channel(s) need as many windows of intensities, got {len(windows)}: {values}")
    return windows


def _window(values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2 or not values[0] < values[1]:
        raise ValueError(f"a window of intensities is (low, high) with low < high, got {tuple(values)}")
    return float(values[0]), float(values[1])


class SliceAsPlaned(MapTransform):
    """Make a 2-D image of a volume with one slice, which is how NIfTI stores 2-D images. Others stay as they are.

    Args:
        keys: entries to look at; each (C, X, Y, 1) or (C, X, Y).
        allow_missing_keys: whether items may lack some keys.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with (C, X, Y) images, placed as :func:`common.io.load_image` places them."""
        item = dict(data)
        for key in self.key_iterator(item):
            scan = item[key]
            if scan.ndim == 4 and scan.shape[-1] == 1:
                affine = affine_3d(in_plane_affine(np.asarray(scan.affine, dtype=np.float64), 2))
                meta = {name: value for name, value in scan.meta.items() if name != "affine"}
                item[key] = MetaTensor(scan.as_tensor()[..., 0], affine=torch.from_numpy(affine), meta=meta)
        return item


class CheckScand(MapTransform):
    """Refuse what later steps would silently get wrong, with the file's name and both values.

    Args:
        keys: entries to check; each (C, *S).
        label_keys: which of them must have integer values and one channel.
        allow_missing_keys: whether items may lack some keys.
        channels: of an image.
    """

    def __init__(
        self,
        keys: Sequence[str],
        label_keys: Sequence[str] = (),
        allow_missing_keys: bool = False,
        channels: int = 1,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.label_keys, self.channels = tuple(label_keys), channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item as it is.

        Raises:
            ValueError: when an entry has another number of channels, is not 2-D or 3-D, has values that are not finite,
                or is a label map with fractional values.
        """
        item = dict(data)
        for key in self.key_iterator(item):
            scan = item[key]
            name = f"'{key}' ({getattr(scan, 'meta', {}).get('filename_or_obj', 'not from a file')})"
            expected = 1 if key in self.label_keys else self.channels
            if scan.shape[0] != expected:
                advice = "one: choose one, or save them one by one" if expected == 1 else f"{expected}"
                raise ValueError(
                    f"{name} has {scan.shape[0]} channels or time points of size {tuple(scan.shape[1:])}, "
                    f"but a scan must have {advice}"
                )
            if scan.ndim not in (3, 4):
                raise ValueError(f"{name} must have 2 or 3 axes in space, got size {tuple(scan.shape[1:])}")
            values = torch.as_tensor(scan)
            if not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name} has {int((~torch.isfinite(values)).sum())} values that are not finite")
            if key in self.label_keys and not bool((values == values.round()).all()):
                raise ValueError(f"{name} must hold whole numbers, as a label map does; is it an image?")
        return item


class ScalePercentilesd(MapTransform):
    """Bring two percentiles of each channel of an image to 0 and 1, clipped. A constant channel becomes 0.

    Where most of an image is background, both percentiles may be the same value though the image is not constant: then
    minimum and maximum take their place.

    Args:
        keys: entries to scale; each (C, *S).
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
        allow_missing_keys: whether items may lack some keys.
    """

    def __init__(
        self, keys: Sequence[str], lower: float = 0.5, upper: float = 99.5, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if not 0.0 <= lower < upper <= 100.0:
            raise ValueError(f"percentiles must be 0 <= lower < upper <= 100, got {lower} and {upper}")
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with its images scaled to float32 in [0, 1]."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key].float()
            scaled = [self._scale(image[channel : channel + 1]) for channel in range(len(image))]
            item[key] = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        return item

    def _scale(self, image: Tensor) -> Tensor:
        # kthvalue, since torch.quantile refuses images of more than 2^24 voxels.
        values = torch.as_tensor(image).flatten()
        low, high = (_percentile(values, percent) for percent in (self.lower, self.upper))
        if high <= low:
            low, high = float(values.min()), float(values.max())
        return (image - low).div_(high - low if high > low else 1.0).clamp_(0.0, 1.0)


def _percentile(values: Tensor, percent: float) -> float:
    """The percentile of a vector, by the nearest of its values."""
    rank = 1 + round(percent / 100.0 * (values.numel() - 1))
    return float(values.kthvalue(rank).values)
