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
"""What is known of a pair beside its scans: the field that relates them, and landmarks; brought to the network's grid.

A listed pair may name ``true_ddf``, a field in Learn2Reg's form (voxels of the fixed file's grid, channel last), and
``moving_landmarks`` and ``fixed_landmarks``, Learn2Reg's text files with a point a line: voxels of the scan's file,
separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.io import Scan, load_field, load_image
from common.spatial.world import field_on_grid

__all__ = ["TRUTH_KEYS", "known_truths", "load_landmarks", "load_truth"]

TRUTH_KEYS = ("true_ddf", "moving_landmarks", "fixed_landmarks")


def known_truths(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of ``true_ddf`` and ``landmarks`` every pair has; none where there is no pair."""
    needed = {"true_ddf": ("true_ddf",), "landmarks": ("moving_landmarks", "fixed_landmarks")}
    return [name for name, keys in needed.items() if pairs and all(pair.get(key) for pair in pairs for key in keys)]


def load_truth(pair: Mapping[str, Any], item: Mapping[str, Any], truths: Sequence[str]) -> dict[str, Tensor]:
    """The truths of a pair on the grids of a prepared item.

    Flips, padding, cropping and resampling of either scan are undone by the affines. A field on another grid than its
    own is interpolated linearly.

    Args:
        pair: with the paths of both scans and of the truths.
        item: with ``fixed`` (C,*S) and both ``*_affine`` (d+1,d+1), as the network sees them.
        truths: of :func:`known_truths`.

    Returns:
        ``true_ddf`` (d,*S) float32 voxels; ``moving_points`` and ``fixed_points`` (N,d) float32 voxels.

    Raises:
        ValueError: when a field does not lie on its scan's grid, or points have not the scan's number of axes, or
            there are not as many on either side.
    """
    scans = {role: load_image(pair[role]) for role in ("moving", "fixed")} if truths else {}
    found: dict[str, Tensor] = {}
    if "true_ddf" in truths:
        found["true_ddf"] = _field(pair["true_ddf"], scans, item)
    if "landmarks" in truths:
        for role, scan in scans.items():
            points = load_landmarks(pair[f"{role}_landmarks"], scan.spatial_dims)
            found[f"{role}_points"] = _placed(points, scan, item[f"{role}_affine"])
        counts = [len(found[f"{role}_points"]) for role in scans]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{pair['moving_landmarks']} has {counts[0]} points but {pair['fixed_landmarks']} has {counts[1]}"
            )
    return found


def load_landmarks(path: str | Path, dimensions: int) -> np.ndarray:
    """Read points, one a line, coordinates separated by commas.

    Args:
        path: of the text file.
        dimensions: how many coordinates a point has.

    Returns:
        (N,d) float64 voxels.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds anything else than lines of ``dimensions`` numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no landmarks at {path}")
    try:
        points = np.loadtxt(path, delimiter=",", ndmin=2, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: expected {dimensions} numbers a line, separated by commas: {error}") from error
    if points.shape[1] != dimensions or not np.isfinite(points).all():
        raise ValueError(f"{path}: expected {dimensions} finite numbers a line, found an array {points.shape}")
    return points


def _field(path: str, scans: Mapping[str, Scan], item: Mapping[str, Any]) -> Tensor:
    fixed, moving = scans["fixed"], scans["moving"]
    ddf = load_field(path, fmt="l2r")
    if tuple(ddf.shape[1:]) != (fixed.spatial_dims, *fixed.array.shape):
        raise ValueError(
            f"{path} has {ddf.shape[1]} components on a grid {tuple(ddf.shape[2:])}, expected {fixed.spatial_dims} on "
            f"that of {fixed.path}, {fixed.array.shape}"
        )
    old = [torch.from_numpy(scan.affine) for scan in (fixed, moving)]
    new = [item["fixed_affine"], item["moving_affine"]]
    shape = tuple(item["fixed"].shape[1:])
    if shape == fixed.array.shape and all(torch.allclose(a, b) for a, b in zip(old, new, strict=True)):
        return ddf[0]
    return field_on_grid(ddf, old[0], old[1], shape, new[0], new[1])[0]


def _placed(points: np.ndarray, scan: Scan, affine: Tensor) -> Tensor:
    """Points in voxels of a scan's file as voxels of the grid with ``affine``."""
    to_new = np.linalg.solve(affine.numpy(), scan.affine)
    d = points.shape[1]
    return torch.from_numpy(points @ to_new[:d, :d].T + to_new[:d, d]).float()
