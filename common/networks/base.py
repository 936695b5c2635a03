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
"""What every encoder and every registration network promises, and the padding that lets them take any image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from common.spatial import resample_field
from common.spatial.exporting import exporting

__all__ = [
    "Encoder",
    "RegistrationNetwork",
    "as_tuple",
    "average_pool",
    "crop_to",
    "encode_pair",
    "pad_to_multiple",
    "paired_channels",
    "split_pair",
    "to_image_grid",
]

Pairing = Literal["joint", "separate"]


class Encoder(nn.Module):
    """A pyramid of feature maps of an image (or of a pair of images).

    Subclasses set the attributes below in their constructor and implement ``forward(x) -> list[Tensor]``, finest map
    first. Map ``i`` has ``feature_channels[i]`` channels; when every axis of ``x`` is a multiple of
    ``max(strides)``, its size is exactly that of ``x`` divided by ``strides[i]``.

    Attributes:
        spatial_dims: 2 or 3.
        in_channels: channels of ``x``: those of one image when ``pairing`` is "separate", of both when it is "joint".
        feature_channels: channels of each map, fine to coarse.
        strides: reduction of each map against ``x``, fine to coarse, powers of two.
        pairing: "joint" when ``x`` is cat(moving, fixed), "separate" when the encoder sees one image at a time.
    """

    spatial_dims: int
    in_channels: int
    feature_channels: tuple[int, ...]
    strides: tuple[int, ...]
    pairing: Pairing

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of ``x``, fine to coarse."""
        raise NotImplementedError


class RegistrationNetwork(nn.Module):
    """A network that turns a pair of images into a displacement field.

    ``forward(image)`` takes cat(moving, fixed), (B, 2C, *S), and returns the ddf (B, d, *S): float32, voxels of the
    fixed grid, pull-back. ``fields(image)`` returns that ddf under "ddf" with whatever else training needs. Subclasses
    implement ``fields``; any image size must do.

    Args:
        spatial_dims: 2 or 3.

    Raises:
        ValueError: when ``spatial_dims`` is neither.
    """

    def __init__(self, spatial_dims: int = 3) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        self.spatial_dims = spatial_dims

    def forward(self, image: Tensor) -> Tensor:
        """Displacement field (B, d, *S) of the pair ``image`` (B, 2C, *S)."""
        ddf: Tensor = self.fields(image)["ddf"]
        return ddf

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Everything that training needs, with at least "ddf"."""
        raise NotImplementedError

    def padded(self, image: Tensor, multiple: int | Sequence[int]) -> Tensor:
        """The pair as a network wants it: checked, a plain float32 tensor, axes multiples of ``multiple``.

        Raises:
            ValueError: when ``image`` is not cat(moving, fixed) of the right number of axes.
        """
        split_pair(image, self.spatial_dims)
        return pad_to_multiple(convert_to_tensor(image, dtype=torch.float32, track_meta=False), multiple)


def as_tuple(value: int | Sequence[int], spatial_dims: int, name: str = "value") -> tuple[int, ...]:
    """One positive integer an axis from one integer or from one an axis.

    Raises:
        ValueError: when the number of values is not ``spatial_dims`` or one of them is below 1.
    """
    values = (int(value),) * spatial_dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != spatial_dims or min(values) < 1:
        raise ValueError(f"{name} needs one positive integer, or {spatial_dims} of them, got {value}")
    return values


def split_pair(image: Tensor, spatial_dims: int) -> tuple[Tensor, Tensor]:
    """Moving and fixed image out of cat(moving, fixed).

    Args:
        image: (B, 2C, *S).
        spatial_dims: the number of axes in S.

    Raises:
        ValueError: when the number of dimensions or of channels does not fit.
    """
    if image.ndim != spatial_dims + 2:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; a {spatial_dims}-D network takes (batch, 2 * channels, "
            f"{', '.join('size' for _ in range(spatial_dims))})"
        )
    if image.shape[1] < 2 or image.shape[1] % 2:
        raise ValueError(f"image has {image.shape[1]} channels; cat(moving, fixed) has an even number")
    moving, fixed = image.chunk(2, dim=1)
    return moving, fixed


def pad_to_multiple(image: Tensor, multiple: int | Sequence[int]) -> Tensor:
    """Lengthen every axis at its end to a multiple, by repeating the last voxel.

    The border is repeated, as a warp with border padding would see it, so that no edge arises where the image ends.

    Args:
        image: (B, C, *S).
        multiple: what every axis (or each in turn) is to be a multiple of.
    """
    size = image.shape[2:]
    multiples = as_tuple(multiple, len(size), "multiple")
    if exporting():
        # Lookups say nothing about which sizes need padding, so the recording holds for all of them.
        for axis, (n, m) in enumerate(zip(size, multiples, strict=True), start=2):
            longer = torch.arange((n + m - 1) // m * m, device=image.device)
            image = image.index_select(axis, longer.clamp_max(n - 1))
        return image
    missing = [-n % m for n, m in zip(size, multiples, strict=True)]
    if not any(missing):
        return image
    return F.pad(image, [amount for m in reversed(missing) for amount in (0, m)], mode="replicate")


def crop_to(field: Tensor, size: Sequence[int]) -> Tensor:
    """Undo ``pad_to_multiple``: keep the first ``size`` voxels of every spatial axis of (B, C, *S)."""
    for axis, n in enumerate(size, start=2):
        if exporting():
            field = field.index_select(axis, torch.arange(n, device=field.device))
        else:
            field = field.narrow(axis, 0, n)
    return field


def average_pool(image: Tensor, factor: int | Sequence[int]) -> Tensor:
    """Mean over blocks of ``factor`` voxels an axis; axes must be multiples of it."""
    factors = as_tuple(factor, image.ndim - 2, "factor")
    if max(factors) == 1:
        return image
    return (F.avg_pool2d if len(factors) == 2 else F.avg_pool3d)(image, factors, factors)


def to_image_grid(field: Tensor, size: Sequence[int]) -> Tensor:
    """A field on a coarse grid as a field on the image grid, displacements rescaled, in float32.

    A coarse voxel covers a block of image voxels, so centres map by the align_corners=False rule.
    """
    if tuple(field.shape[2:]) == tuple(size):
        return field.float()
    return resample_field(field.float(), size, align_corners=False)


def paired_channels(encoder: Encoder) -> tuple[int, ...]:
    """Channels of the maps that ``encode_pair`` returns, fine to coarse."""
    factor = 1 if encoder.pairing == "joint" else 2
    return tuple(factor * channels for channels in encoder.feature_channels)


def encode_pair(encoder: Encoder, image: Tensor) -> list[Tensor]:
    """Feature maps of a pair, fine to coarse.

    A joint encoder sees both images at once. A separate one is applied to each with the same weights (in one batch) and
    the two maps of a level are concatenated, moving first. They are not added: a sum is the same for (moving, fixed) as
    for (fixed, moving), so whatever is computed from it could not tell a motion from its reverse.

    Args:
        encoder: any encoder.
        image: cat(moving, fixed), (B, 2C, *S).
    """
    if encoder.pairing == "joint":
        return encoder(image)
    both = encoder(torch.cat(split_pair(image, encoder.spatial_dims), dim=0))
    return [torch.cat(level.chunk(2, dim=0), dim=1) for level in both]
