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
"""The slices of a report: stacks of a plane, turned as they are looked at and small enough to send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.handlers.report.volumes import Volumes
from common.handlers.views import PLANE_NAMES, PLANE_SIDES

__all__ = ["MAX_PIXELS", "MAX_SLICES", "Plane", "planes"]

Array = NDArray[Any]

MAX_SLICES = 48
MAX_PIXELS = 256
_OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


@dataclass(frozen=True)
class Plane:
    """The slices of one plane. Stacks are (slices, rows down, columns right).

    Attributes:
        name: such as ``axial``.
        images, labels, maps: stacks by name.
        points: (slice, row, column) of landmarks by name.
        source: (2, ...) stacks: column and row from which each pixel comes, in pixels of this plane.
        log_determinant: stack, of the Jacobian; 0 where it is folded.
        folded: stack, whether any voxel of a pixel is folded.
        captions: what each slice is.
        start: the slice to show first.
        sides: what lies left, right, at the bottom and at the top; empty where it is not known.
        millimetres: width and height of a slice.
    """

    name: str
    images: dict[str, Array]
    labels: dict[str, Array]
    maps: dict[str, Array]
    points: dict[str, Array]
    source: Array
    log_determinant: Array
    folded: Array
    captions: list[str]
    start: int
    sides: tuple[str, ...]
    millimetres: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.folded.shape[1], self.folded.shape[2]


def planes(volumes: Volumes) -> list[Plane]:
    """Axial, coronal and sagittal slices of a 3-D pair, the one image of a 2-D pair."""
    if len(volumes.shape) == 2:
        return [_plane(volumes, None)]
    return [_plane(volumes, axis) for axis in (2, 1, 0)]


def _plane(volumes: Volumes, axis: int | None) -> Plane:
    view = _View.of(volumes, axis)
    folded = volumes.determinant <= 0
    logarithm = np.log(np.where(folded, 1.0, volumes.determinant))
    sources = [view.cut(volumes.source[k], "mean") for k in (view.across, view.up)]
    return Plane(
        name="image" if axis is None else PLANE_NAMES[axis],
        images={name: np.rint(view.cut(v, "mean")).astype(np.uint8) for name, v in volumes.images.items()},
        labels={name: view.cut(v, "centre") for name, v in volumes.labels.items()},
        maps={name: view.cut(v, "mean") for name, v in volumes.maps.items()},
        points={name: view.place(p) for name, p in volumes.points.items()},
        source=np.stack([view.column(sources[0]), view.row(sources[1])]),
        log_determinant=view.cut(logarithm, "mean"),
        folded=view.cut(folded, "any"),
        captions=[_caption(volumes, axis, int(index)) for index in view.indices],
        start=_start(volumes, axis, view.indices),
        sides=_sides(volumes, axis),
        millimetres=view.millimetres(volumes),
    )


@dataclass(frozen=True)
class _View:
    """Which voxels are seen in a plane: their first and last along both axes, and how many there are to a pixel."""

    axis: int | None
    indices: Array
    across: int
    up: int
    ends: Array
    steps: tuple[int, int]

    @classmethod
    def of(cls, volumes: Volumes, axis: int | None) -> _View:
        across, up = (k for k in range(len(volumes.shape)) if k != axis)
        ends = volumes.box[[across, up]]
        steps = -(-(ends[:, 1] - ends[:, 0] + 1) // MAX_PIXELS)
        indices = np.zeros(1, dtype=int)
        if axis is not None:
            first, last = volumes.box[axis]
            indices = np.rint(np.linspace(first, last, min(MAX_SLICES, last - first + 1))).astype(int)
        return cls(axis, indices, across, up, ends, (int(steps[0]), int(steps[1])))

    @property
    def pixels(self) -> tuple[int, int]:
        """Columns and rows."""
        columns, rows = (-(-int(last - first + 1) // n) for (first, last), n in zip(self.ends, self.steps, strict=True))
        return columns, rows

    def cut(self, volume: Array, how: Literal["mean", "any", "centre"]) -> Array:
        """The stack of a volume (*S): one value for the voxels of each pixel."""
        slices = volume[None] if self.axis is None else np.moveaxis(volume.take(self.indices, self.axis), self.axis, 0)
        (left, right), (bottom, top) = self.ends
        slices = slices[:, left : right + 1, bottom : top + 1]
        (columns, rows), (wide, high) = self.pixels, self.steps
        if (wide, high) != (1, 1):
            missing = (columns * wide - slices.shape[1], rows * high - slices.shape[2])
            slices = np.pad(slices, ((0, 0), (0, missing[0]), (0, missing[1])), mode="edge")
            blocks = slices.reshape(len(slices), columns, wide, rows, high)
            if how == "centre":
                slices = blocks[:, :, wide // 2, :, high // 2]
            else:
                slices = np.asarray(blocks.any((2, 4)) if how == "any" else blocks.mean((2, 4)))
        stack = slices.transpose(0, 2, 1)[:, ::-1]
        # As radiologists see it: the patient's right, or front, is on the left.
        return np.ascontiguousarray(stack if self.axis is None else stack[:, :, ::-1])

    def column(self, position: Array) -> Array:
        """Of voxels along the first axis that is seen."""
        columns = (position - self.ends[0, 0] - (self.steps[0] - 1) / 2) / self.steps[0]
        return columns if self.axis is None else self.pixels[0] - 1 - columns

    def row(self, position: Array) -> Array:
        """Of voxels along the second axis that is seen."""
        rows = (position - self.ends[1, 0] - (self.steps[1] - 1) / 2) / self.steps[1]
        return self.pixels[1] - 1 - rows

    def place(self, points: Array) -> Array:
        """(slice, row, column) of those points (N, d) that are nearest to a slice shown and on it."""
        number = np.zeros(len(points))
        seen = np.ones(len(points), dtype=bool)
        if self.axis is not None:
            away = np.abs(points[:, self.axis, None] - self.indices[None])
            number = away.argmin(1)
            seen = away.min(1) <= max(1.0, float(np.diff(self.indices).max(initial=1))) / 2
        columns, rows = self.column(points[:, self.across]), self.row(points[:, self.up])
        for value, size in ((columns, self.pixels[0]), (rows, self.pixels[1])):
            seen &= (value > -0.5) & (value < size - 0.5)
        return np.stack([number, rows, columns], axis=1)[seen]

    def millimetres(self, volumes: Volumes) -> tuple[float, float]:
        """Width and height of what the pixels stand for."""
        sizes = [n * k for n, k in zip(self.pixels, self.steps, strict=True)]
        return float(sizes[0] * volumes.millimetres[self.across]), float(sizes[1] * volumes.millimetres[self.up])


def _caption(volumes: Volumes, axis: int | None, index: int) -> str:
    """Where a slice is: in mm, at its centre, and in the file."""
    if axis is None:
        return ""
    centre = [(n - 1) / 2 for n in volumes.shape]
    centre[axis] = index
    place = float((volumes.affine @ [*centre, 1.0])[axis])
    file_axis, file_index = volumes.file_index(axis, index)
    side = "RAS"[axis] if place >= 0 else "LPI"[axis]
    return f"{abs(place):.1f} mm {side}, voxel {file_index} of axis {file_axis}"


def _start(volumes: Volumes, axis: int | None, indices: Array) -> int:
    """The slice through the middle of the fixed labels, or of the content."""
    label = volumes.labels.get("fixed")
    middle = indices.mean()
    if axis is not None and label is not None and (label > 0).any():
        counts = (label > 0).sum(axis=tuple(k for k in range(label.ndim) if k != axis))
        middle = (np.arange(len(counts)) * counts).sum() / counts.sum()
    return int(np.abs(indices - middle).argmin())


def _sides(volumes: Volumes, axis: int | None) -> tuple[str, ...]:
    if axis is not None:
        return PLANE_SIDES[axis]
    right, top = volumes.codes()
    return _OPPOSITE[right], right, _OPPOSITE[top], top
