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
"""Everything that a report draws, on one grid that is turned for the reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nibabel.orientations import aff2axcodes, apply_orientation, io_orientation
from numpy.typing import NDArray

from common.handlers.report.inputs import ReportInputs
from common.handlers.views import first_channel, to_array, to_ras
from common.spatial import jacobian_determinant

__all__ = ["Volumes", "turned_volumes"]

Array = NDArray[Any]

# Of the grey scale: what is darker counts as empty when the box around the content is sought.
_EMPTY = 12
_MARGIN = 2


@dataclass(frozen=True)
class Volumes:
    """A pair on the fixed file's grid; in 3-D its axes run right, anterior and superior.

    Attributes:
        images: ``fixed``, ``before``, ``moved``: (*S) uint8. The latter two share one grey scale.
        labels: likewise, integers.
        points: likewise, (N, d) voxels.
        maps: (*S) floats by title.
        source: (d, *S), where each voxel comes from, in voxels of this grid.
        determinant: (*S), of the Jacobian of ``source``.
        millimetres: size of a voxel.
        affine: (4, 4) from voxels to RAS mm.
        orientation: (d, 2) as nibabel has it: the axis of this grid, and its direction, that each axis of the file is.
        box: (d, 2) first and last voxel of the content along each axis.
    """

    images: Mapping[str, Array]
    labels: Mapping[str, Array]
    points: Mapping[str, Array]
    maps: Mapping[str, Array]
    source: Array
    determinant: Array
    millimetres: Array
    affine: Array
    orientation: Array
    box: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels along each axis."""
        return self.determinant.shape

    def file_index(self, axis: int, index: int) -> tuple[int, int]:
        """Axis and index in the fixed file of a slice of this grid."""
        file_axis = int(np.flatnonzero(self.orientation[:, 0] == axis)[0])
        forward = self.orientation[file_axis, 1] > 0
        return file_axis, index if forward else self.shape[axis] - 1 - index

    def codes(self) -> tuple[str, ...]:
        """The direction in which each axis runs: R, A, S and their opposites L, P, I."""
        return tuple(str(code) for code in aff2axcodes(self.affine)[: len(self.shape)])


def turned_volumes(inputs: ReportInputs) -> Volumes:
    """Bring what a report is made of onto one grid; 2-D images are not turned."""
    shape = inputs.fixed.array.shape
    dims = len(shape)
    images = _grey({"fixed": inputs.fixed.array, "before": inputs.before, "moved": inputs.moved}, shape)
    given = {name: getattr(inputs, f"{name}_label") for name in ("fixed", "before", "moved")}
    labels = {name: first_channel(label, shape) for name, label in given.items() if label is not None}
    maps = {title: first_channel(volume, shape).astype(np.float32) for title, volume in inputs.maps.items()}
    displacement = _in_fixed_voxels(inputs)
    affine, millimetres = inputs.fixed.affine_3d, np.asarray(inputs.fixed.spacing)
    orientation = np.stack([np.arange(dims), np.ones(dims)], axis=1)
    if dims == 3:
        orientation = io_orientation(affine)
        images, labels, displacement, millimetres = to_ras(images, labels, displacement, affine)
        maps = {title: apply_orientation(volume, orientation) for title, volume in maps.items()}
        affine = _turned_affine(affine, orientation, shape)
    source = displacement + np.stack(np.meshgrid(*map(np.arange, displacement.shape[1:]), indexing="ij")).astype("f4")
    points = {name: getattr(inputs, f"{name}_points") for name in ("fixed", "before", "moved")}
    return Volumes(
        images=images,
        labels=labels,
        points={name: _turned_points(p, orientation, shape) for name, p in points.items() if p is not None},
        maps=maps,
        source=source,
        determinant=jacobian_determinant(torch.from_numpy(np.ascontiguousarray(displacement))[None])[0].numpy(),
        millimetres=millimetres,
        affine=affine,
        orientation=orientation,
        box=_content(images),
    )


def _grey(images: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Array]:
    """Bytes: 0 and 255 are percentiles 0.5 and 99.8, of the fixed image or of the moving one before and after."""
    volumes = {name: np.nan_to_num(first_channel(v, shape).astype(np.float32)) for name, v in images.items()}
    grey = {}
    for group in (("fixed",), ("before", "moved")):
        # A seventh of the voxels tells the percentiles well enough, and small images count in full.
        sample = np.concatenate([volumes[name].ravel()[:: 7 if volumes[name].size > 100_000 else 1] for name in group])
        low, high = (float(value) for value in np.percentile(sample, (0.5, 99.8)))
        if high <= low:  # Nearly everything is background.
            low, high = (float(function([function(volumes[name]) for name in group])) for function in (np.min, np.max))
        scale = 255.0 / (high - low) if high > low else 0.0
        for name in group:
            grey[name] = np.rint(np.clip((volumes[name] - low) * scale, 0, 255)).astype(np.uint8)
    return grey


def _in_fixed_voxels(inputs: ReportInputs) -> Array:
    """The displacement (d, *S) in voxels of the fixed file, whatever the moving file's grid is."""
    shape = inputs.fixed.array.shape
    dims = len(shape)
    ddf = to_array(inputs.ddf).astype(np.float32).reshape(dims, *shape)
    matrix = np.linalg.solve(inputs.fixed.affine, inputs.moving.affine)
    if np.allclose(matrix, np.eye(dims + 1), atol=1e-6):
        return ddf
    here = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float64)
    there = np.tensordot(matrix[:dims, :dims], here + ddf, axes=1)
    offset = matrix[:dims, dims].reshape(dims, *(1,) * dims)
    return (there + offset - here).astype(np.float32)


def _turned_affine(affine: Array, orientation: Array, shape: tuple[int, ...]) -> Array:
    """Of the turned array: its voxels are where they were."""
    back = np.eye(4)
    for axis, (to, sign) in enumerate(orientation):
        back[axis, :] = 0
        back[axis, int(to)] = sign
        back[axis, 3] = 0 if sign > 0 else shape[axis] - 1
    return affine @ back


def _turned_points(points: Any, orientation: Array, shape: tuple[int, ...]) -> Array:
    given = to_array(points).astype(np.float64)
    turned = np.empty_like(given)
    for axis, (to, sign) in enumerate(orientation):
        turned[:, int(to)] = given[:, axis] if sign > 0 else shape[axis] - 1 - given[:, axis]
    return turned


def _content(images: Mapping[str, Array]) -> Array:
    """The box around what is not dark in any image, with a margin; all of it where everything is dark."""
    filled = np.any([image > _EMPTY for image in images.values()], axis=0)
    box = []
    for axis, size in enumerate(filled.shape):
        where = np.flatnonzero(filled.any(axis=tuple(k for k in range(filled.ndim) if k != axis)))
        box.append((max(where[0] - _MARGIN, 0), min(where[-1] + _MARGIN, size - 1)) if len(where) else (0, size - 1))
    return np.asarray(box)
