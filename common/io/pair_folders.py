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
"""A folder for each pair of a list, and how to see that it is complete."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.io.files import writing

__all__ = ["PairFolders", "named_columns", "write_measures"]

_FILES = (
    *("moving", "fixed", "moving_label", "fixed_label", "moving_frame", "fixed_frame"),
    *("moving_points", "fixed_points", "points_space", "affine"),
)
_DIGITS = 12
_PART = 2**20


class PairFolders:
    """Where the results of each pair are, and which pairs have theirs already.

    A folder is complete once it has ``metrics.json``, which is written last and appears whole or not at all. Beside the
    measures that file names the scans and the settings, so that a folder of the same name with results of other scans,
    or found in another way, does not count.

    Args:
        output_dir: folder of the folders.
        columns: what the values of each measure are called, such as the labels; see
            :class:`common.handlers.MetricsTable`.
        overwrite: take no folder for complete.
        settings: what results depend on, by name: numbers, words, files, or lists of these. A file counts by what it
            holds: its name is followed by the beginning of its SHA-256. None compares no settings.
    """

    def __init__(
        self,
        output_dir: str | Path,
        columns: Mapping[str, Sequence[str]] | None = None,
        overwrite: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir, self.overwrite = Path(output_dir), overwrite
        self.settings = None if settings is None else {name: _stated(value) for name, value in settings.items()}
        self.columns = {name: list(values) for name, values in (columns or {}).items()}

    def of(self, name: str) -> Path:
        """The folder of the pair of this ``id``."""
        return self.output_dir / name

    def complete(self, pair: Mapping[str, Any]) -> bool:
        """Whether a pair need not be registered again."""
        return not self.overwrite and self._read(pair["id"]).get("files") == _files(pair) and not self.changed(pair)

    def changed(self, pair: Mapping[str, Any]) -> str:
        """Which settings are others than those that a pair was registered with, in words.

        Returns:
            such as ``"refine 0, now 50"``; empty when nothing changed, or the pair was not registered before.
        """
        stored = self._read(pair["id"])
        if self.settings is None or stored.get("files") != _files(pair):
            return ""
        old = stored.get("settings")
        if not isinstance(old, dict):
            return "settings that it does not name"
        names = dict.fromkeys([*self.settings, *old])
        pairs = {name: (old.get(name, "unknown"), self.settings.get(name, "unknown")) for name in names}
        return "; ".join(f"{name} {was}, now {now}" for name, (was, now) in pairs.items() if was != now)

    def restart(self, name: str) -> None:
        """Make a folder incomplete, before something in it changes."""
        (self.of(name) / "metrics.json").unlink(missing_ok=True)

    def finish(
        self,
        pair: Mapping[str, Any],
        measures: Mapping[str, Sequence[float]],
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a folder complete.

        Args:
            pair: with ``id`` and its files.
            measures: values by name; what could not be measured is NaN, and null in the file.
            about: what else the file says, and no table does; no lists.
        """
        columns = named_columns(measures, self.columns)
        known = {} if self.settings is None else {"settings": self.settings}
        stated = {**(about or {}), "files": _files(pair), **known, "columns": columns}
        write_measures(self.of(pair["id"]), measures, stated)

    def measures(self, name: str) -> tuple[dict[str, list[float]], dict[str, list[str]]]:
        """What :meth:`finish` stored of the pair of this ``id``, and what its values are called."""
        stored = self._read(name)
        values = {key: row for key, row in stored.items() if isinstance(row, list)}
        numbers = {key: [math.nan if value is None else float(value) for value in row] for key, row in values.items()}
        return numbers, stored.get("columns", {})

    def _read(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.of(name) / "metrics.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


def named_columns(
    measures: Mapping[str, Sequence[float]], columns: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[str]]:
    """What the values of those measures are called that have several."""
    return {name: columns[name] for name, row in measures.items() if name in columns and len(row) > 1}


def write_measures(folder: Path, measures: Mapping[str, Sequence[float]], about: Mapping[str, Any]) -> None:
    """Write ``metrics.json``, whole or not at all.

    Args:
        folder: of the pair.
        measures: values by name; NaN becomes null, as JSON has no NaN.
        about: what else the file says.
    """
    values = {name: [None if math.isnan(value) else value for value in row] for name, row in measures.items()}
    with writing(folder / "metrics.json", [".json"]) as partial:
        partial.write_text(json.dumps({**values, **about}, indent=2) + "\n", encoding="utf-8")


def _stated(value: Any) -> Any:
    """A setting as JSON has it."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_stated(each) for each in value]
    path = Path(str(value).removesuffix(":inverse"))
    if not path.is_file():
        return str(value)
    return f"{Path(str(value)).name} ({_digest(path)[:_DIGITS]})"


def _digest(path: Path) -> str:
    """The SHA-256 of a file of any size."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while part := stream.read(_PART):
            found.update(part)
    return found.hexdigest()


def _files(pair: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(pair[key]) for key in _FILES if pair.get(key) not in (None, "")}
