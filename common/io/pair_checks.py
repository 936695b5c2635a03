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
"""What is wrong with two scans that should be registered, or odd about them: refused or said, never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np

from common.io.label_maps import label_values, require_label_map
from common.io.scan_checks import PairError, check_header, check_size, check_values, check_window, require_place
from common.io.scans import Scan

__all__ = ["PairError", "check_labels", "check_overlap", "check_pair"]

_SCALE = 5.0  # of one field of view to the other
_LITTLE = 0.1  # part of the fixed field of view
_LATTICE = 17  # points along an axis
_TURNED = 0.8  # cosine between the normals of two slices


def check_pair(
    moving: Scan,
    fixed: Scan,
    *,
    spacing: Sequence[float] | None = None,
    stacks: bool = False,
    window: Sequence[float] | None = None,
    preset: bool = False,
) -> list[str]:
    """Look at two scans before any work is done on them, headers first.

    Args:
        moving: the moving scan.
        fixed: the fixed scan.
        spacing: that they will be seen at, mm; None for their own.
        stacks: whether they are stacks of slices that are registered one by one.
        window: of intensities, if there is one.
        preset: whether the window is one for CT, in Hounsfield units.

    Returns:
        warnings, each of which names its file.

    Raises:
        PairError: when they cannot be registered as they are; names the file, what was found and what to do.
    """
    if moving.spatial_dims != fixed.spatial_dims:
        raise PairError(
            f"{moving.path} is {moving.spatial_dims}-D, with shape {moving.array.shape}, and {fixed.path} is "
            f"{fixed.spatial_dims}-D, with shape {fixed.array.shape}: they cannot be registered. Expected two slices "
            "or two volumes"
        )
    found = [message for scan in (moving, fixed) for message in check_header(scan)]
    found += [message for scan in (moving, fixed) for message in check_size(scan, spacing, stacks)]
    _require_one_scale(moving, fixed)
    found += _turned_slices(moving, fixed)
    for scan in (moving, fixed):
        check_values(scan)
        found += check_window(scan, window, preset) if window is not None else []
    return found


def check_overlap(moving: Scan, fixed: Scan, matrix: np.ndarray, source: str = "", later: bool = False) -> list[str]:
    """Look at whether two fields of view meet in the world.

    Args:
        moving: the moving scan.
        fixed: the fixed scan.
        matrix: (d+1, d+1), takes points of the fixed scan's world to the moving one's.
        source: the file that the matrix is from; the headers alone if empty.
        later: whether they are going to be aligned, so that it is no error when they do not meet.

    Returns:
        a warning when little of the fixed scan, or nothing, lies in the moving one.

    Raises:
        PairError: when they do not meet and nothing will bring them together, or it is not known where one of them is.
    """
    for scan in () if later else (moving, fixed):
        require_place(scan)
    forth = _part_inside(fixed, moving, np.asarray(matrix))
    met = forth > 0 or _part_inside(moving, fixed, np.linalg.inv(matrix)) > 0
    where = f"under {source}" if source else "as their headers place them"
    files = f"{moving.path} and {fixed.path}"
    if met and (later or forth >= _LITTLE):
        return []
    if met:
        return [
            f"{files}: {forth:.1%} of the fixed field of view lies in the moving one {where}; is the alignment right? "
            + _advice(source)
        ]
    middles = f"their middles are at {_middle(moving)} and {_middle(fixed)} mm"
    if later:
        return [f"{files} do not meet in the world ({middles}): they are brought together by their centres of mass"]
    raise PairError(f"{files} do not meet in the world {where} ({middles}): expected some overlap. {_advice(source)}")


def check_labels(scans: Sequence[Scan], maps: Sequence[Scan]) -> list[str]:
    """Look at the label maps of two scans.

    Args:
        scans: moving and fixed.
        maps: their label maps, in the same order.

    Returns:
        warnings: a map without any label, a label that only one of the two has.

    Raises:
        GridError: when a map lies on another grid than its scan.
        ValueError: for fractional values, or too many different ones.
    """
    for scan, label in zip(scans, maps, strict=True):
        require_label_map(scan, label)
    values = [set(label_values(label)) for label in maps]
    found = [
        f"{label.path} holds no label, all of its voxels are 0: overlap with it cannot be measured"
        for label, own in zip(maps, values, strict=True)
        if not own
    ]
    if all(values):
        for one, other in ((0, 1), (1, 0)):
            alone = sorted(values[one] - values[other])
            if alone:
                found.append(
                    f"labels {alone} of {maps[one].path} are absent from {maps[other].path}: their overlap is not "
                    "measured"
                )
    return found


def _require_one_scale(moving: Scan, fixed: Scan) -> None:
    sizes = [np.array(scan.array.shape) * np.array(scan.spacing) for scan in (moving, fixed)]
    longest = [float(size.max()) for size in sizes]
    factor = max(longest) / min(longest)
    if factor > _SCALE:
        (first, second) = (" x ".join(f"{side:.4g}" for side in size) for size in sizes)
        raise PairError(
            f"{moving.path} covers {first} mm and {fixed.path} covers {second} mm, a factor of {factor:.4g}; expected "
            f"at most {_SCALE:g}. A factor of about 1000 is a header in metres or micrometres: write it in mm. If both "
            "are right, crop the larger scan to what the smaller one shows"
        )


def _turned_slices(moving: Scan, fixed: Scan) -> list[str]:
    """Whether two slices were cut along different planes."""
    if fixed.spatial_dims == 3:
        return []
    normals = [np.cross(scan.affine_3d[:3, 0], scan.affine_3d[:3, 1]) for scan in (moving, fixed)]
    cosine = abs(normals[0] @ normals[1]) / (np.linalg.norm(normals[0]) * np.linalg.norm(normals[1]))
    if cosine > _TURNED:
        return []
    return [
        f"{moving.path} ({moving.orientation}) and {fixed.path} ({fixed.orientation}) are slices of different planes: "
        "do they show the same?"
    ]


def _part_inside(scan: Scan, other: Scan, matrix: np.ndarray) -> float:
    """How much of a field of view, taken by a map of the world, lies in another one."""
    axes = [np.linspace(-0.5, n - 0.5, _LATTICE) for n in scan.array.shape]
    points = np.array(list(product(*axes)))
    to_other = np.linalg.solve(other.affine, matrix @ scan.affine)
    voxels = points @ to_other[:-1, :-1].T + to_other[:-1, -1]
    return float(((voxels >= -0.5) & (voxels <= np.array(other.array.shape) - 0.5)).all(1).mean())


def _middle(scan: Scan) -> list[float]:
    middle = scan.affine @ np.array([*((n - 1) / 2 for n in scan.array.shape), 1.0])
    return [float(value) for value in middle[:-1].round(1)]


def _advice(source: str) -> str:
    if source:
        return "Does the file belong to these two, and does it lead from the fixed to the moving scan? Try ':inverse'"
    return "Let `affine` be 'affine', 'rigid' or 'centre', which starts from the centres of mass"
