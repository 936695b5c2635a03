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
"""Lists of pairs with one atlas, as lines ``fixedID,movingID`` without a header."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["find_pair_lists", "read_pair_list"]


def find_pair_lists(names: Mapping[str, Sequence[str]], root: Path) -> tuple[str | None, dict[str, list[str]]]:
    """The lists that are there, in the data's folder or the one around it.

    Args:
        names: which file names each split may have.
        root: folder of the data.

    Returns:
        the atlas's id, None without any list, and the moving ids of each split that has one.

    Raises:
        ValueError: when a line is no pair or has another fixed id than the first line of the first list.
    """
    atlas: str | None = None
    found: dict[str, list[str]] = {}
    for split, alternatives in names.items():
        paths = (folder / name for name in alternatives for folder in (root, root.parent))
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            atlas, found[split] = read_pair_list(path, atlas)
    return atlas, found


def read_pair_list(path: Path, atlas: str | None = None) -> tuple[str, list[str]]:
    """Read one list.

    Args:
        path: of the file.
        atlas: the id that all lines must have first. Default: that of the first line.

    Returns:
        the atlas's id, and the moving ids in the file's order; the atlas itself is left out.

    Raises:
        ValueError: when a line is no pair, has another fixed id or repeats a moving one; or there is none.
    """
    moving: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, line in enumerate(csv.reader(file), start=1):
            cells = [cell.strip() for cell in line]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"{path}, line {number}: expected 'fixedID,movingID', found {','.join(line)!r}")
            atlas = cells[0] if atlas is None else atlas
            if cells[0] != atlas:
                raise ValueError(
                    f"{path}, line {number}: the fixed image is '{cells[0]}', but all are registered to the atlas "
                    f"'{atlas}' of the first line"
                )
            if cells[1] in moving:
                raise ValueError(f"{path}, line {number}: '{cells[1]}' is listed twice")
            if cells[1] != atlas:
                moving.append(cells[1])
    if atlas is None or not moving:
        raise ValueError(f"{path} lists no pair: expected lines 'fixedID,movingID'")
    return atlas, moving
