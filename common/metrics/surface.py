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
"""Distances between the surfaces of labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.metrics.utils import get_code_to_measure_table
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor

from common.metrics.base import RegistrationMetric, check_definition, per_item_spacing
from common.metrics.overlap import check_label_maps, check_labels

__all__ = [
    "AverageSurfaceDistance",
    "HausdorffDistance",
    "HausdorffDistance95",
    "SurfaceDistances",
    "surface_distances",
]

Mask = NDArray[np.bool_]
Values = NDArray[np.float64]


class SurfaceDistances(NamedTuple):
    """Distances from each surface element to the other surface, and the size of each element.

    Attributes:
        a_to_b, b_to_a: distances in mm; empty where the surface is.
        a_sizes, b_sizes: areas (3-D, mm^2) or lengths (2-D, mm) of the elements; ones for voxel contours.
    """

    a_to_b: Values
    b_to_a: Values
    a_sizes: Values
    b_sizes: Values


def contour(mask: Mask) -> tuple[Values, Values]:
    """Voxels of the mask with a face neighbour outside it, and ones as their sizes.

    The edge of the image is no surface: where a structure is cut off by the field of view, nothing ends.

    Returns:
        indices (N, d) and sizes (N,).
    """
    inner = ndimage.binary_erosion(mask, border_value=1)
    points = np.argwhere(mask & ~inner).astype(np.float64)
    return points, np.ones(len(points))


def surface_elements(mask: Mask, spacing: Sequence[float]) -> tuple[Values, Values]:
    """Elements of the surface between voxel centres (marching cubes on 2^d neighbourhoods) and their areas.

    As in DeepMind's ``surface-distance``, which Learn2Reg uses: outside the image there is background, and an element
    is located at the corner of its neighbourhood.

    Returns:
        indices (N, d) and areas in mm^2, or lengths in mm (N,).
    """
    table, kernel = get_code_to_measure_table(list(spacing))
    weights = np.asarray(kernel, dtype=np.int64).reshape((2,) * mask.ndim)
    padded = np.pad(mask, 1).astype(np.int64)
    size = [n - 1 for n in padded.shape]
    code = np.zeros(size, dtype=np.int64)
    for corner in np.ndindex(*weights.shape):
        window = tuple(slice(start, start + n) for start, n in zip(corner, size, strict=True))
        code += weights[corner] * padded[window]
    on_surface = (code != 0) & (code != weights.sum())
    return np.argwhere(on_surface).astype(np.float64), np.asarray(table, dtype=np.float64)[code[on_surface]]


def surface_distances(a: Mask, b: Mask, spacing: Sequence[float], *, weighted: bool = False) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks.

    Args:
        a, b: boolean arrays of one shape, 2-D or 3-D.
        spacing: mm per axis.
        weighted: elements between voxels with their areas (:func:`surface_elements`) instead of :func:`contour` voxels.

    Returns:
        distances both ways; infinite where only the other surface is missing.
    """
    sides = [surface_elements(m, spacing) if weighted else contour(m) for m in (a, b)]
    (points_a, sizes_a), (points_b, sizes_b) = [(points * np.asarray(spacing), sizes) for points, sizes in sides]
    return SurfaceDistances(_nearest(points_a, points_b), _nearest(points_b, points_a), sizes_a, sizes_b)


def _nearest(points: Values, others: Values) -> Values:
    if len(points) == 0 or len(others) == 0:
        return np.full(len(points), np.inf)
    # A tree over the surface alone is much smaller than a distance map of the whole box.
    return np.asarray(KDTree(others, leafsize=32).query(points)[0], dtype=np.float64)


class _SurfaceMetric(RegistrationMetric):
    """Loop over items and labels; a subclass turns one label's distances into a number."""

    weighted = False

    def __init__(self, labels: Sequence[int], spacing: Any = None) -> None:
        super().__init__()
        self.labels = check_labels(labels)
        self.columns = tuple(str(label) for label in self.labels)
        self.spacing = spacing

    def _compute_tensor(  # type: ignore[override]
        self, moved_label: Tensor, fixed_label: Tensor, moving_label: Tensor | None = None, *, spacing: Any = None
    ) -> Tensor:
        check_label_maps(moved_label=moved_label, fixed_label=fixed_label)
        spacings = per_item_spacing(
            self.spacing if spacing is None else spacing, len(moved_label), moved_label.ndim - 2
        )
        maps = [(m[0].cpu().numpy(), f[0].cpu().numpy()) for m, f in zip(moved_label, fixed_label, strict=True)]
        rows = []
        for index, (moved, fixed) in enumerate(maps):
            before = None if moving_label is None else set(moving_label[index].unique().tolist())
            rows.append(
                [self._label(a, b, label, spacings[index], before) for label, a, b in self._crops(moved, fixed)]
            )
        return torch.tensor(rows, dtype=torch.float32, device=moved_label.device)

    def _crops(self, moved: NDArray[Any], fixed: NDArray[Any]) -> Iterator[tuple[int, Mask, Mask]]:
        boxes = [_boxes(image, self.labels) for image in (moved, fixed)]
        for label in self.labels:
            box = _union(boxes[0][label], boxes[1][label], moved.shape)
            yield label, moved[box] == label, fixed[box] == label

    def _label(self, moved: Mask, fixed: Mask, label: int, spacing: Sequence[float], before: set[int] | None) -> float:
        there = bool(moved.any()) if before is None else label in before
        if not there or not fixed.any():
            return float("nan")
        if not moved.any():
            return float("inf")
        distances = surface_distances(moved, fixed, spacing, weighted=self.weighted)
        if len(distances.a_to_b) == 0 or len(distances.b_to_a) == 0:
            return float("nan")  # A label that fills the image has no surface in it.
        return self._summary(distances)

    def _summary(self, distances: SurfaceDistances) -> float:
        raise NotImplementedError


def _boxes(image: NDArray[Any], labels: Sequence[int]) -> dict[int, tuple[slice, ...] | None]:
    """The bounding box of each label, found in one pass over the image."""
    ordered = np.sort(np.asarray(labels))
    place = np.minimum(np.searchsorted(ordered, image), len(ordered) - 1)
    codes = np.where(ordered[place] == image, place + 1, 0)
    found = ndimage.find_objects(codes, max_label=len(labels))
    return {int(label): box for label, box in zip(ordered, found, strict=True)}


def _union(a: tuple[slice, ...] | None, b: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[slice, ...]:
    """The box around two boxes and one voxel more, so that the crop's edge is not taken for the image's."""
    given = [box for box in (a, b) if box is not None]
    if not given:
        return tuple(slice(0, 0) for _ in shape)
    return tuple(
        slice(max(min(box[k].start for box in given) - 1, 0), min(max(box[k].stop for box in given) + 1, n))
        for k, n in enumerate(shape)
    )


class HausdorffDistance(_SurfaceMetric):
    """Largest distance between two surfaces in mm, or a percentile of it, of the worse direction, per label.

    ``definition="standard"``: percentile over the contour voxels, with the image's spacing. ``"learn2reg"``: surface
    elements weighted by their area (DeepMind's robust Hausdorff distance) and, as the challenge has it, a spacing of
    one whatever the image's, so the value is in voxels.

    A label that is missing in either map is NaN. With the unwarped ``moving_label`` as third input, a label that
    warping has lost is infinitely far.

    Args:
        labels: the labels to measure, in the order of the columns.
        spacing: mm per axis (a number, one number per axis, or one row per item); ``spacing=`` at call overrides it.
        definition: ``"standard"`` or ``"learn2reg"``.
        percentile: between 0 and 100; 100 is the largest distance.
    """

    def __init__(
        self, labels: Sequence[int], spacing: Any = None, definition: str = "standard", percentile: float = 100.0
    ) -> None:
        super().__init__(labels, spacing)
        self.definition = check_definition(definition)
        self.weighted = definition == "learn2reg"
        self.percentile = percentile

    def _compute_tensor(  # type: ignore[override]
        self, moved_label: Tensor, fixed_label: Tensor, moving_label: Tensor | None = None, *, spacing: Any = None
    ) -> Tensor:
        if self.definition == "standard":
            return super()._compute_tensor(moved_label, fixed_label, moving_label, spacing=spacing)
        return super()._compute_tensor(moved_label, fixed_label, moving_label, spacing=1.0)

    def _summary(self, distances: SurfaceDistances) -> float:
        if self.definition == "standard":
            return float(max(np.percentile(side, self.percentile) for side in (distances.a_to_b, distances.b_to_a)))
        forward = _weighted_percentile(distances.a_to_b, distances.a_sizes, self.percentile)
        return max(forward, _weighted_percentile(distances.b_to_a, distances.b_sizes, self.percentile))


class HausdorffDistance95(HausdorffDistance):
    """:class:`HausdorffDistance` at the 95th percentile, which single stray voxels do not decide.

    Args:
        labels: the labels to measure, in the order of the columns.
        spacing: as for :class:`HausdorffDistance`.
        definition: ``"standard"`` or ``"learn2reg"``.
        percentile: between 0 and 100.
    """

    def __init__(
        self, labels: Sequence[int], spacing: Any = None, definition: str = "standard", percentile: float = 95.0
    ) -> None:
        super().__init__(labels, spacing, definition, percentile)


def _weighted_percentile(values: Values, weights: Values, percentile: float) -> float:
    """The smallest value within which the given share of the weight lies."""
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(share, percentile / 100)), len(values) - 1)])


class AverageSurfaceDistance(_SurfaceMetric):
    """Mean distance between two surfaces in mm, per label: the mean of the two directed means.

    Equal weight for both directions, as in ITK's ``HausdorffDistanceImageFilter.GetAverageHausdorffDistance``; MONAI's
    symmetric distance instead pools all distances, so the larger surface weighs more. Contour voxels are those with a
    face neighbour outside the label; the edge of the image is no contour.

    A label that is missing in either map is NaN. With the unwarped ``moving_label`` as third input, a label that
    warping has lost is infinitely far.

    Args:
        labels: the labels to measure, in the order of the columns.
        spacing: mm per axis (a number, one number per axis, or one row per item); ``spacing=`` at call overrides it.
    """

    def _summary(self, distances: SurfaceDistances) -> float:
        return float((distances.a_to_b.mean() + distances.b_to_a.mean()) / 2)
