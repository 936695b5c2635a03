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
"""Landmarks of a pair of scans: point k of one file is where the tissue of point k of the other one lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.io.points import SPACES, PointsError, from_ras, load_points, to_ras
from common.io.scans import Scan
from common.io.transforms import grid_of

__all__ = ["load_pair_points"]

_ROLES = ("moving", "fixed")
_IN_WORDS = {"voxel": "voxels of the image", "ras": "RAS mm", "lps": "LPS mm"}


def load_pair_points(
    files: Mapping[str, str | Path], scans: Mapping[str, Scan], space: str = "ras"
) -> tuple[dict[str, Tensor], list[str]]:
    """Read the landmarks of both scans.

    Args:
        files: CSV files (:func:`common.io.points.load_points`) by role, ``moving`` and ``fixed``.
        scans: that the points lie in, by role.
        space: of the points: ``voxel``, of each one's own scan, ``ras`` or ``lps``.

    Returns:
        points (N, d) float64 in RAS mm by role; and a warning for each file most of whose points lie outside of their
        scan, which says in which space they would not.

    Raises:
        FileNotFoundError: when there is no such file.
        PointsError: for a file without its partner, without points or with something else, or two files of which one
            has more points.
        ValueError: for an unknown space.
    """
    missing = [role for role in _ROLES if not files.get(role)]
    if missing:
        (given,) = (path for path in files.values() if path)
        raise PointsError(f"{given} has no partner: landmarks need a file of the {missing[0]} scan too")
    coordinates = {role: load_points(files[role], scans[role].spatial_dims).coordinates for role in _ROLES}
    first, second = (f"{files[role]} has {len(coordinates[role])} points" for role in _ROLES)
    if len(coordinates["moving"]) != len(coordinates["fixed"]):
        raise PointsError(f"{first} but {second}: row k of one is to be the partner of row k of the other")
    if not len(coordinates["moving"]):
        raise PointsError(f"{first}, expected one or more")
    points = {role: to_ras(coordinates[role], space, grid_of(scans[role])) for role in _ROLES}
    notes = []
    for role in _ROLES:
        inside = {one: _inside(to_ras(coordinates[role], one, grid_of(scans[role])), scans[role]) for one in SPACES}
        if inside[space] < 0.5:
            notes.append(_outside(files[role], scans[role], inside, space))
    return points, notes


def _inside(points: Tensor, scan: Scan) -> float:
    """The part of points, in RAS mm, that lies in a scan, half a voxel beyond its outermost centres at most."""
    voxels = from_ras(points, "voxel", grid_of(scan)).numpy()
    return float(((voxels >= -0.5) & (voxels <= [n - 0.5 for n in scan.array.shape])).all(1).mean())


def _outside(path: str | Path, scan: Scan, inside: Mapping[str, float], space: str) -> str:
    found = f"{1 - inside[space]:.0%} of the points in {path} lie outside of {scan.path} as {_IN_WORDS[space]}"
    better = max((one for one in SPACES if one != space), key=inside.__getitem__)
    if inside[better] < 0.5:
        return f"{found}; in no other space do most of them lie in it. Are they points of this scan?"
    advice = f"as {_IN_WORDS[better]} {inside[better]:.0%} lie in it: is --points_space {better} meant?"
    return f"{found}, the wrong space perhaps; {advice}"
