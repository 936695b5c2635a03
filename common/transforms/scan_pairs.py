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
"""From the files of a pair to what a network sees: both scans on one grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Transform
from torch import Tensor

from common.io import (
    Scan,
    check_labels,
    check_overlap,
    check_pair,
    load_image,
    load_label_map,
    load_pair_points,
    pair_grid,
)
from common.io.label_maps import require_label_map
from common.io.scans import affine_3d
from common.spatial import Affine
from common.transforms.grids import affine_of, onto_grid, spaced_grid
from common.transforms.pair_alignment import FRAMES, PairAlignment
from common.transforms.preprocessing import WINDOWS, intensity_window, scan_transforms
from common.transforms.stacks import stack_transforms

__all__ = ["LoadScanPaird"]

logger = logging.getLogger(__name__)

_ROLES = ("moving", "fixed")
_STILL = 1e-4  # of the entries of an affine map that moves nothing


class LoadScanPaird(Transform):
    """Load the scans of a pair, each pair on a grid of its own.

    Both lie on the fixed scan's grid, its axes turned to point right, anterior and superior: the fixed scan as it is,
    the moving scan resampled once, where an affine map of the world places it. Slices keep their axes. With ``affine``
    "frames", headers say sizes and spacing but not places: the frames of both scans are laid on each other, middle on
    middle, and padded to one size (:func:`common.io.pair_grid`). So cohorts are evaluated.

    Before any work the pair is looked at: what cannot be registered is refused, what is odd is logged as a warning
    (:mod:`common.io.pair_checks`).

    Args:
        intensity: as for :func:`common.transforms.scan_transforms`, each scan by itself, before it is resampled: "mri",
            "ct_lung", "ct_abdomen", "none", "percentile", "minmax" or a window; stacks are windowed slice by slice
            whatever it is.
        padding: beyond a scan, ``"zeros"`` or ``"border"``.
        stacks: whether scans are stacks of slices that are registered one by one.
        label_map: what each value of label maps becomes, see :func:`common.transforms.scan_transforms`.
        affine: "frames", or as for :class:`common.transforms.PairAlignment`: "affine", "rigid", "similarity", "centre",
            "none" or files. Stacks take "none" or "frames", which are the same for them.
        aligner: :func:`common.engines.register_affine`, for the first four.
        affine_similarity: what it maximises.
        spacing: voxel size in mm at which both are seen, one number or one along each of right, anterior and superior,
            such as that of the scans that a network was trained on; None is the fixed scan's own.
        device: where the affine map is sought.

    Raises:
        ValueError: for options that are wrong whatever the pair.
        FileNotFoundError: for a file of ``affine`` that is not there.
    """

    def __init__(
        self,
        intensity: str | Sequence[float] = "percentile",
        padding: str = "zeros",
        stacks: bool = False,
        label_map: Mapping[int, int] | None = None,
        affine: str | Path | Sequence[str | Path] = FRAMES,
        aligner: Callable[..., Any] | None = None,
        affine_similarity: str = "ncc",
        spacing: float | Sequence[float] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.intensity, self.padding, self.stacks, self.label_map = intensity, padding, stacks, label_map
        self.alignment = PairAlignment(affine, aligner, affine_similarity, device)
        if stacks and (self.alignment.kind not in (FRAMES, "none") or spacing is not None):
            raise ValueError(
                f"slices of stacks are registered one to one as they lie: `affine` must be 'none' and `spacing` None, "
                f"got {affine!r} and {spacing!r}"
            )
        self.spacing = spacing
        self._spacing(3)  # Options that are wrong are so for every pair: say it now.
        self._framed_steps(_ROLES, [1, 1], None)
        self._steps(_ROLES, 2)

    def __call__(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """Replace files by what they hold.

        Args:
            pair: files ``moving`` and ``fixed``; ``moving_label`` and ``fixed_label`` are loaded where both are there;
                ``moving_frame`` and ``fixed_frame``, of 4-D scans, as for :func:`common.io.load_image`; landmarks
                ``moving_points`` and ``fixed_points`` in ``points_space`` (:func:`common.io.load_pair_points`), RAS mm
                by default; ``affine``, a file that is used for this pair whatever the option says.

        Returns:
            the pair with MetaTensors in place of these, images (1, *S) float32 and label maps (1, *S) int32, whose
            affines lead from the voxels that the network sees to the world of each file; ``timings`` (seconds by name:
            ``load`` and, if one was sought or read, ``affine``); ``affine_matrix`` (d+1, d+1) float64, from the fixed
            to the moving scan's world, except with "frames"; ``alignment``, how that was found, in words; ``warnings``,
            a line each, if there are any.

            Landmarks become (N, d) float32, in voxels of what the network sees of their own scan: the distance from
            their partners, mm in the moving file's world, is that of ``x + ddf(x)`` and ``moving_points`` under the
            affine of ``moving``. Where an affine map moved anything, ``initial_label`` (1, *S) and ``initial_points``
            (N, d) are the moving scan's labels, on the same grid, and the fixed scan's landmarks, in voxels of the
            moving image, as the headers alone place them.

        Raises:
            FileNotFoundError, ScanError: for a file that is missing or cannot be read.
            PairError, ValueError: for two scans that cannot be registered, a label map or landmarks that are none.
            GridError: for a label map that lies elsewhere than its scan.
        """
        began = time.perf_counter()
        scans = {role: load_image(pair[role], pair.get(f"{role}_frame")) for role in _ROLES}
        notes = self._look(scans)
        maps = _label_maps(pair, scans)
        notes += check_labels(list(scans.values()), list(maps.values())) if maps else []
        points, odd = _points(pair, scans)
        notes += odd
        alignment = self._alignment(pair)
        framed = self.stacks or alignment.kind == FRAMES
        matrix = None
        if not framed:
            matrix = alignment.known(scans["moving"], scans["fixed"])
            notes += _look_at_overlap(scans, matrix, alignment)
        for note in notes:
            logger.warning(note)
        images = {role: _image(scan) for role, scan in scans.items()}
        images |= {f"{role}_label": _image(scan) for role, scan in maps.items()}
        loaded, spent = self._framed(scans, images) if framed else self._aligned(images, matrix, alignment)
        loaded |= _seen_points(points, loaded)
        timings = {"load": time.perf_counter() - began - sum(spent.values()), **spent}
        about = {"warnings": "\n".join(notes)} if notes else {}
        return {**pair, **loaded, **about, "timings": timings}

    def _alignment(self, pair: Mapping[str, Any]) -> PairAlignment:
        """That of a pair, which may have a file of its own.

        Raises:
            ValueError: for such a file of stacks.
        """
        own = pair.get("affine")
        if not own:
            return self.alignment
        if self.stacks:
            raise ValueError(f"slices of stacks are registered one to one as they lie: {own} cannot align them")
        return PairAlignment(own)

    def _look(self, scans: Mapping[str, Scan]) -> list[str]:
        """Refuse, or list, what is wrong with two scans."""
        window = None if self.stacks else intensity_window(self.intensity)
        preset = isinstance(self.intensity, str) and self.intensity in WINDOWS
        spacing = self._spacing(scans["fixed"].spatial_dims)
        return check_pair(
            scans["moving"], scans["fixed"], spacing=spacing, stacks=self.stacks, window=window, preset=preset
        )

    def _framed(self, scans: Mapping[str, Scan], images: Mapping[str, MetaTensor]) -> tuple[dict[str, Any], dict]:
        """Both scans about their middles, padded to one size."""
        spacing = self._spacing(scans["fixed"].spatial_dims)
        grid = pair_grid(scans["moving"], scans["fixed"], self.stacks, spacing=spacing)
        # MONAI takes what is called `moving_...` for notes about `moving`, and fails when it is an image.
        called = {key: "_".join(reversed(key.split("_"))) for key in images}
        steps = self._framed_steps(list(called.values()), grid["spatial_size"], grid["spacing"])
        framed = steps({called[key]: image for key, image in images.items()})
        return {**{key: framed[called[key]] for key in images}, "alignment": self.alignment.in_words}, {}

    def _aligned(
        self, images: Mapping[str, MetaTensor], matrix: np.ndarray | None, alignment: PairAlignment
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """Both scans on the fixed one's grid; and how long finding the map took."""
        dims = images["fixed"].ndim - 1
        ready = self._steps(list(images), dims)(dict(images))
        began = time.perf_counter()
        said = alignment.in_words
        if matrix is None:
            matrix, said = alignment.find(ready["moving"], ready["fixed"])
        spent = {"affine": time.perf_counter() - began}
        own = tuple(ready["fixed"].shape[1:]), affine_of(ready["fixed"])
        grid = spaced_grid(*own, self._spacing(dims))
        if "moving_label" in ready and _moves(matrix):
            ready["initial_label"] = onto_grid(
                ready["moving_label"], *grid, np.eye(dims + 1), label=True, padding=self.padding
            )
        for key in images:
            label = key.endswith("_label")
            if key.startswith("moving"):
                ready[key] = onto_grid(ready[key], *grid, matrix, label=label, padding=self.padding)
            elif not np.array_equal(grid[1], own[1]):
                # To its edge, a coarser grid may reach half a voxel beyond the outermost centres.
                ready[key] = onto_grid(ready[key], *grid, np.eye(dims + 1), label=label, padding="border")
        return {**ready, "affine_matrix": torch.from_numpy(matrix), "alignment": said}, spent

    def _steps(self, keys: Sequence[str], dims: int) -> Compose:
        """Turn, window and merge, without resampling."""
        options: dict[str, Any] = {"intensity": self.intensity, "padding": self.padding, "label_map": self.label_map}
        return scan_transforms(keys, orientation="RAS" if dims == 3 else None, load=False, **options)

    def _framed_steps(self, keys: Sequence[str], size: Sequence[int], spacing: Sequence[float] | None) -> Compose:
        if self.stacks:
            return stack_transforms(keys, size, spacing, padding=self.padding, load=False)
        return scan_transforms(
            keys,
            size,
            orientation="RAS" if len(size) == 3 else None,
            spacing=spacing,
            intensity=self.intensity,
            padding=self.padding,
            label_map=self.label_map,
            load=False,
        )

    def _spacing(self, dims: int) -> list[float] | None:
        """One number an axis.

        Raises:
            ValueError: for numbers that are none, not positive, or not as many as there are axes.
        """
        if self.spacing is None:
            return None
        given: Any = self.spacing
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given] * dims
        numbers = all(isinstance(value, (int, float)) and value > 0 for value in values)
        if not numbers or len(values) not in (2, 3):
            raise ValueError(f"spacing must be one number or one along each axis, in mm and above 0, got {given!r}")
        return [float(value) for value in values]


def _look_at_overlap(scans: Mapping[str, Scan], matrix: np.ndarray | None, alignment: PairAlignment) -> list[str]:
    start = np.eye(scans["fixed"].spatial_dims + 1) if matrix is None else matrix
    return check_overlap(scans["moving"], scans["fixed"], start, alignment.source, later=matrix is None)


def _points(pair: Mapping[str, Any], scans: Mapping[str, Scan]) -> tuple[dict[str, Tensor], list[str]]:
    """Landmarks (N, d) in RAS mm by role, of a pair that has them, and what is odd about them."""
    files = {role: pair[f"{role}_points"] for role in _ROLES if pair.get(f"{role}_points")}
    return load_pair_points(files, scans, pair.get("points_space") or "ras") if files else ({}, [])


def _seen_points(points: Mapping[str, Tensor], loaded: Mapping[str, Any]) -> dict[str, Tensor]:
    """Landmarks in voxels of the images that the network sees."""
    if not points:
        return {}
    to_voxels = {role: Affine(torch.from_numpy(np.linalg.inv(affine_of(loaded[role])))) for role in _ROLES}
    seen = {f"{role}_points": to_voxels[role].points(points[role]).float() for role in _ROLES}
    if "affine_matrix" in loaded and _moves(loaded["affine_matrix"]):
        seen["initial_points"] = to_voxels["moving"].points(points["fixed"]).float()
    return seen


def _moves(matrix: np.ndarray | Tensor) -> bool:
    """Whether an affine map is more than the identity."""
    return not np.allclose(matrix, np.eye(len(matrix)), rtol=0, atol=_STILL)


def _label_maps(pair: Mapping[str, Any], scans: Mapping[str, Scan]) -> dict[str, Scan]:
    """The label maps of a pair that has both; a map alone is looked at, and not loaded."""
    named = [role for role in _ROLES if pair.get(f"{role}_label")]
    maps = {role: load_label_map(pair[f"{role}_label"], pair.get(f"{role}_frame")) for role in named}
    if len(maps) == len(_ROLES):
        return maps
    for role, label in maps.items():
        require_label_map(scans[role], label)
    return {}


def _image(scan: Scan) -> MetaTensor:
    """(1, *S) float32, with what MONAI's own loader notes of a file."""
    affine = torch.from_numpy(affine_3d(scan.affine))
    meta = {"filename_or_obj": str(scan.path), "original_affine": affine.clone()}
    return MetaTensor(torch.from_numpy(scan.array.astype(np.float32))[None], affine=affine, meta=meta)
