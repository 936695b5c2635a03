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
"""Points and landmarks in CSV files: in voxels, or in mm along the RAS or the LPS axes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.io.files import writing
from common.spatial.transform import Affine, Grid

__all__ = ["SPACES", "PointTable", "PointsError", "from_ras", "load_points", "save_points", "to_ras"]

SPACES = ("voxel", "ras", "lps")
_AXES = ("x", "y", "z")


class PointsError(ValueError):
    """A file that holds no points; the message names it and the line."""


@dataclass(frozen=True)
class PointTable:
    """Points and whatever else stands in their rows.

    Attributes:
        coordinates: (N, d) float64, in the file's own space.
        header: names of the columns, or None for a file of bare numbers.
        rows: the rows as they were read.
        columns: which columns are the coordinates.
    """

    coordinates: np.ndarray
    header: tuple[str, ...] | None
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[int, ...]


def load_points(path: str | Path, dims: int) -> PointTable:
    """Read a CSV with the columns ``x``, ``y`` and, for volumes, ``z``.

    They may stand in any order and among others: ANTs' files have ``t`` and ``label``. Without a header the first
    ``dims`` numbers of a row are the point, as in Learn2Reg's files.

    Args:
        path: of the file.
        dims: 2 or 3.

    Raises:
        FileNotFoundError: when there is no such file.
        PointsError: for other columns, or a coordinate that is no finite number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no points at {path}")
    with open(path, newline="", encoding="utf-8-sig") as stream:
        rows = [tuple(cell.strip() for cell in row) for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    if not rows:
        raise PointsError(f"{path} holds no points")
    header = None if all(_is_number(cell) for cell in rows[0][:dims]) else rows[0]
    columns = tuple(range(dims)) if header is None else _coordinate_columns(header, dims, path)
    body = rows if header is None else rows[1:]
    first = 1 + len(rows) - len(body)
    values = [_coordinates(row, columns, path, number) for number, row in enumerate(body, start=first)]
    return PointTable(np.array(values, dtype=np.float64).reshape(-1, dims), header, tuple(body), columns)


def save_points(
    path: str | Path, table: PointTable, coordinates: Tensor | np.ndarray, *, overwrite: bool = True
) -> Path:
    """Write a table with other coordinates in the same columns; all else stays as it was.

    Args:
        path: ends in ``.csv``.
        table: as it was read.
        coordinates: (N, d).
        overwrite: replace an existing file.
    """
    rows = []
    for row, point in zip(table.rows, np.asarray(coordinates, dtype=np.float64), strict=True):
        cells = list(row)
        for column, value in zip(table.columns, point, strict=True):
            cells[column] = f"{value:.6f}"
        rows.append(cells)
    with writing(path, (".csv",), overwrite) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([table.header] if table.header else [])
        writer.writerows(rows)
    return Path(path)


def to_ras(coordinates: np.ndarray, space: str, grid: Grid | None = None) -> Tensor:
    """Points (N, d) of a space to RAS mm, float64.

    Args:
        coordinates: in ``space``.
        space: ``voxel`` (indices of ``grid``, the first voxel's centre being 0), ``ras`` or ``lps``.
        grid: of the image that voxels count in.

    Raises:
        ValueError: for another space, or voxels of no grid.
    """
    points = torch.as_tensor(np.asarray(coordinates), dtype=torch.float64)
    return Affine(_to_ras(space, grid, points.shape[1])).points(points)


def from_ras(points: Tensor, space: str, grid: Grid | None = None) -> Tensor:
    """The inverse of :func:`to_ras`."""
    return Affine(torch.linalg.inv(_to_ras(space, grid, points.shape[1]))).points(points.double())


def _to_ras(space: str, grid: Grid | None, dims: int) -> Tensor:
    if space == "voxel":
        if grid is None:
            raise ValueError("points in voxels say nothing without the image whose voxels they are: name it")
        return grid.affine
    if space not in SPACES:
        raise ValueError(f"unknown space '{space}' of points, expected one of {list(SPACES)}")
    signs = [1.0] * (dims + 1) if space == "ras" else [-1.0, -1.0, *[1.0] * (dims - 1)]
    return torch.diag(torch.tensor(signs, dtype=torch.float64))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _coordinate_columns(header: Sequence[str], dims: int, path: Path) -> tuple[int, ...]:
    names = [name.lower() for name in header]
    wanted = _AXES[:dims]
    if any(names.count(axis) != 1 for axis in wanted):
        raise PointsError(f"{path} has the columns {list(header)}, expected {list(wanted)} among them, each once")
    return tuple(names.index(axis) for axis in wanted)


def _coordinates(row: Sequence[str], columns: Sequence[int], path: Path, number: int) -> list[float]:
    try:
        values = [float(row[column]) for column in columns]
    except (IndexError, ValueError):
        values = [np.nan]
    if not np.isfinite(values).all():
        raise PointsError(f"{path}, row {number}: expected a finite number for each coordinate, found {list(row)}")
    return values
