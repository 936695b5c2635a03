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
"""Which scans to register: two files, a CSV of pairs, a dataset JSON, a named cohort."""

from __future__ import annotations

import csv
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.data.cohort import Cohort, load_cohort
from common.data.datalist import Entry, unique_ids
from common.data.places import require_files
from common.io.headers import scan_dims
from common.io.label_maps import label_values, load_label_map
from common.io.points import SPACES

__all__ = ["COLUMNS", "PairList", "read_pair_table"]

logger = logging.getLogger(__name__)

_SCANS = ("moving", "fixed", "moving_label", "fixed_label")
_POINTS = ("moving_points", "fixed_points")
_FILES = (*_SCANS, *_POINTS, "affine")
COLUMNS = (*_FILES, "id", "moving_id", "fixed_id")
SPLITS = ("test", "validation", "training_pairs")
_TABLES = (".csv", ".tsv")
# What a file system forbids, or reads as a path.
_UNSAFE = re.compile(r'[\\/:*?"<>|\x00-\x1f]')
_TAKEN = ("", ".", "..", "metrics.csv", "summary.csv")
_LONGEST = 200
_SHOWN = 3


class PairList(Sequence[Entry]):
    """The pairs of one run of inference, all of one dimension.

    Without ``pairs`` it is the one pair ``moving``, ``fixed``, or else the first test pair of a cohort, as an example.
    Otherwise each pair gets an ``id``, the name of its folder: ``<moving_id>_to_<fixed_id>`` unless the list has one.
    Scans that are missing or cannot be read are no error here, as long as some pair has both: a list is registered as
    far as it can be.

    Args:
        pairs: a CSV (:func:`read_pair_table`), a Learn2Reg or Decathlon dataset JSON, the name of a cohort
            (:func:`common.data.load_cohort`), or None.
        split: which pairs of a JSON or cohort: ``"test"``, ``"validation"`` or ``"training_pairs"``.
        dataset_dir: folder of the data of a JSON or cohort.
        moving, fixed: the files of the one pair.
        moving_label, fixed_label: its label maps.
        example: name of the cohort that the example is taken from.
        stacks: whether scans are stacks of slices that a 2-D network registers one by one.
        moving_points, fixed_points: its landmarks, CSV files of as many rows, row k of one the partner of row k of the
            other; see :func:`common.io.points.load_points`.
        points_space: of the landmarks of the pair or of a CSV: ``"ras"`` or ``"lps"``, mm, or ``"voxel"``, of each
            one's own scan, which is what those of a JSON or cohort are in any case. Pairs with landmarks have it too.
        frame: which one of 4-D scans, counted from 0; every pair then has ``moving_frame`` and ``fixed_frame``.
        moving_frame, fixed_frame: where it is not the same for both.

    Attributes:
        spatial_dims: 2 or 3, what the network has to be made for.
        labels: the labels that overlap is measured of: those the cohort states, else all that the label maps have.
        label_map: what each value of the label maps becomes, where the cohort merges some.
        landmarks: whether any pair has landmarks.

    Raises:
        FileNotFoundError, ScanError: when no pair at all can be read.
        ValueError: for an unusable list, pairs of one name, or pairs of different dimension.
    """

    def __init__(
        self,
        pairs: str | Path | None = None,
        split: str = "test",
        dataset_dir: str | Path | None = None,
        moving: str | Path | None = None,
        fixed: str | Path | None = None,
        moving_label: str | Path | None = None,
        fixed_label: str | Path | None = None,
        example: str = "synthetic",
        stacks: bool = False,
        frame: int | None = None,
        moving_frame: int | None = None,
        fixed_frame: int | None = None,
        moving_points: str | Path | None = None,
        fixed_points: str | Path | None = None,
        points_space: str = "ras",
    ) -> None:
        self.labels: list[int] = []
        self.label_map: dict[int, int] = {}
        if points_space not in SPACES:
            raise ValueError(f"--points_space must be one of {list(SPACES)}, got {points_space!r}")
        files = (moving, fixed, moving_label, fixed_label, moving_points, fixed_points)
        given = {key: str(path) for key, path in zip((*_SCANS, *_POINTS), files, strict=True) if path is not None}
        if pairs is None:
            self.pairs = [_one_pair(given, example, dataset_dir)]
        elif given:
            raise ValueError(f"--pairs {pairs} lists what to register: leave out {', '.join(f'--{k}' for k in given)}")
        elif str(pairs).lower().endswith(_TABLES):
            self.pairs = _named(read_pair_table(pairs), str(pairs))
        else:
            self.pairs = _named(self._of_cohort(str(pairs), split, dataset_dir), str(pairs))
        own = {"moving_frame": moving_frame, "fixed_frame": fixed_frame}
        frames = {key: frame if one is None else one for key, one in own.items()}
        chosen = {key: int(one) for key, one in frames.items() if one is not None}
        self.landmarks = any(pair.get("moving_points") for pair in self.pairs)
        self.pairs = [{**_space(pair, points_space), **pair, **chosen} for pair in self.pairs]
        self.spatial_dims = 2 if stacks else _dimension(self.pairs)
        self.labels = self.labels or _labels(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return self.pairs[index]

    def _of_cohort(self, pairs: str, split: str, dataset_dir: str | Path | None) -> list[Entry]:
        if split not in SPLITS:
            raise ValueError(f"--split must be one of {list(SPLITS)}, got {split!r}")
        # A file that is missing concerns its own pair only.
        cohort = load_cohort(pairs, dataset_dir, must_exist=False)
        listed: list[Entry] = getattr(cohort, split)
        if not listed:
            counts = {name: len(getattr(cohort, name)) for name in SPLITS}
            raise ValueError(f"{pairs} has no pairs under --split {split}; it has {counts}")
        _require_some_files(cohort, listed)
        several = next((pair for pair in listed if pair.get("moving_channels") or pair.get("fixed_channels")), None)
        if several:
            raise ValueError(f"{pairs}: {several['moving']} has several channels; inference registers scans with one")
        self.labels = cohort.evaluation_labels or cohort.foreground_labels
        self.label_map = cohort.label_map
        return [{**{key: pair[key] for key in COLUMNS if pair.get(key)}, **_known_points(pair)} for pair in listed]


def read_pair_table(path: str | Path) -> list[Entry]:
    """Read pairs from a table with a header: commas, semicolons or tabs between columns, UTF-8.

    Columns are ``moving`` and ``fixed`` and, if wanted, ``moving_label``, ``fixed_label``, ``moving_points`` and
    ``fixed_points`` (landmarks, both or none), ``affine`` (a file, as :class:`common.transforms.PairAlignment` takes
    it), ``id`` (of the pair), ``moving_id`` and ``fixed_id``, in any order; cells of the latter may be empty. Paths
    start from the table's folder. An image without an id is called by its file's name, or by its path where file names
    repeat.

    Args:
        path: of the table.

    Returns:
        pairs with absolute paths, whether there are such files or not.

    Raises:
        FileNotFoundError: when there is no such table.
        ValueError: for a column that is missing, unknown or there twice, a row without a scan or with the landmarks of
            one scan only, or no row at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table of pairs at {path}")
    root = Path(os.path.abspath(path)).parent
    rows = []
    for number, row in _rows(path):
        for key in ("moving", "fixed"):
            if not row[key]:
                raise ValueError(f"{path}, line {number}: the column '{key}' is empty")
        filled = {key: cell for key, cell in row.items() if cell}
        _require_both_points(filled, f"{path}, line {number}: ", "")
        rows.append({key: os.path.normpath(root / cell) if key in _FILES else cell for key, cell in filled.items()})
    if not rows:
        raise ValueError(f"{path} lists no pair")
    return _with_image_ids(rows)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as CSV in UTF-8") from error
    header = next((line for line in lines if line.strip()), "")
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    columns: list[str] = []
    reader = csv.reader(lines, delimiter=delimiter)
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if not columns:
            columns = _columns(cells, path)
            continue
        if len(cells) != len(columns):
            found = f"{len(cells)} cells for the {len(columns)} columns {columns}"
            raise ValueError(
                f"{path}, line {reader.line_num}: found {found}; put quotes round names with '{delimiter}'"
            )
        yield reader.line_num, dict(zip(columns, cells, strict=True))


def _columns(cells: list[str], path: Path) -> list[str]:
    unknown = [cell for cell in cells if cell not in COLUMNS]
    if unknown:
        raise ValueError(f"{path}: unknown columns {unknown} in the first line, expected some of {list(COLUMNS)}")
    missing = [name for name in ("moving", "fixed") if name not in cells]
    if missing or len(set(cells)) < len(cells):
        problem = f"there is no column {missing}" if missing else "a column is there twice"
        raise ValueError(f"{path}: {problem}, the first line has {cells}")
    return cells


def _with_image_ids(rows: list[Entry]) -> list[Entry]:
    """Call images by their files' names, or by their paths below the folder that all share where names repeat."""
    paths = [row[role] for row in rows for role in ("moving", "fixed")]
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    relative = {path: os.path.relpath(path, base) for path in paths}
    ids = unique_ids(relative.values())
    roles = ("moving", "fixed")
    default = [{f"{role}_id": ids[Path(relative[row[role]]).as_posix()] for role in roles} for row in rows]
    return [{**own, **row} for own, row in zip(default, rows, strict=True)]


def _one_pair(given: Entry, example: str, dataset_dir: str | Path | None) -> Entry:
    scans = {key: given.get(key) for key in ("moving", "fixed")}
    missing = [key for key, path in scans.items() if path is None]
    if len(missing) == 1:
        other = "fixed" if missing == ["moving"] else "moving"
        raise ValueError(f"--{other} {scans[other]} has no partner: give --{missing[0]} too")
    if missing:
        pair = load_cohort(example, dataset_dir).test[0]
        scans = {key: str(pair[key]) for key in scans}
    _require_both_points(given, "", "--")
    return {**given, **scans, "moving_id": "moving", "fixed_id": "fixed"}


def _require_both_points(pair: Entry, where: str, option: str) -> None:
    missing = [key for key in _POINTS if not pair.get(key)]
    if len(missing) == 1:
        (other,) = (key for key in _POINTS if key not in missing)
        raise ValueError(f"{where}{option}{other} {pair[other]} has no partner: give {option}{missing[0]} too")


def _known_points(pair: Entry) -> Entry:
    """The landmarks of a cohort's pair, if it has both."""
    known = {f"{role}_points": str(pair.get(f"{role}_landmarks") or "") for role in ("moving", "fixed")}
    return {**known, "points_space": "voxel"} if all(known.values()) else {}


def _space(pair: Entry, space: str) -> Entry:
    return {"points_space": space} if pair.get("moving_points") else {}


def _named(pairs: list[Entry], where: str) -> list[Entry]:
    """Give every pair an ``id`` that can be a folder.

    Raises:
        ValueError: for an id that cannot, or that two pairs share.
    """
    named: list[Entry] = []
    taken: dict[str, Entry] = {}
    for pair in pairs:
        name = _UNSAFE.sub("_", str(pair.get("id") or f"{pair['moving_id']}_to_{pair['fixed_id']}")).strip()
        if name in _TAKEN or len(name.encode()) > _LONGEST:
            raise ValueError(f"{where}: {name!r} cannot be the folder of a pair: give the pair another `id`")
        # Names that differ by case only are one folder on some file systems.
        key = unicodedata.normalize("NFC", name).casefold()
        if key in taken:
            first, second = ((other["moving"], other["fixed"]) for other in (taken[key], pair))
            raise ValueError(f"{where}: the pairs {first} and {second} are both called {name!r}: give them an `id`")
        taken[key] = pair
        named.append({**pair, "id": name})
    return named


def _dimension(pairs: list[Entry]) -> int:
    """The dimension of all pairs that can be read.

    Raises:
        FileNotFoundError, ScanError, ValueError: why the first pair cannot be read, when none can.
        ValueError: for pairs of different dimension; names a file of each.
    """
    found: dict[int, str] = {}
    first: Exception | None = None
    for pair in pairs:
        try:
            moving, fixed = (scan_dims(pair[role], pair.get(f"{role}_frame")) for role in ("moving", "fixed"))
            if moving != fixed:
                files = f"{pair['moving']} is {moving}-D and {pair['fixed']} is {fixed}-D"
                raise ValueError(f"{files}: they cannot be registered; expected two slices or two volumes")
            found.setdefault(moving, pair["moving"])
        except (OSError, ValueError) as error:
            first = first or error
    if len(found) > 1:
        raise ValueError(f"{found[2]} is 2-D and {found[3]} is 3-D: one network cannot register both, split the list")
    if first is not None and not found:
        if len(pairs) > 1:
            logger.error("none of %d pairs can be registered", len(pairs))
        raise first
    return next(iter(found))


def _labels(pairs: list[Entry]) -> list[int]:
    """All labels of pairs that have both maps; what is wrong with a map is said when its pair is loaded."""
    complete = [pair for pair in pairs if all(pair.get(key) for key in _SCANS)]
    roles = ("moving", "fixed")
    maps = {(pair[f"{role}_label"], pair.get(f"{role}_frame")) for pair in complete for role in roles}
    found: set[int] = set()
    for path, frame in maps:
        try:
            found |= set(label_values(load_label_map(path, frame)))
        except (OSError, ValueError):
            continue
    return sorted(found)


def _require_some_files(cohort: Cohort, listed: list[Entry]) -> None:
    """A folder in which nothing is found is the wrong one: say where to get the data."""
    files = list(dict.fromkeys(pair[role] for pair in listed for role in ("moving", "fixed")))
    if not any(os.path.isfile(path) for path in files):
        require_files(cohort.name, files, cohort.dataset_dir, cohort.meta)
