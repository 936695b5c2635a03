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

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.io.files import writing

__all__ = ["PairFolders", "write_measures"]

_FILES = ("moving", "fixed", "moving_label", "fixed_label", "moving_frame", "fixed_frame")


class PairFolders:
    """Where the results of each pair are, and which pairs have theirs already.

    A folder is complete once it has ``metrics.json``, which is written last and appears whole or not at all. Beside the
    measures that file names the scans, so that a folder of the same name with results of other scans does not count.

    Args:
        output_dir: folder of the folders.
        columns: what the values of each measure are called, such as the labels; see
            :class:`common.handlers.MetricsTable`.
        overwrite: take no folder for complete.
    """

    def __init__(
        self, output_dir: str | Path, columns: Mapping[str, Sequence[str]] | None = None, overwrite: bool = False
    ) -> None:
        self.output_dir, self.overwrite = Path(output_dir), overwrite
        self.columns = {name: list(values) for name, values in (columns or {}).items()}

    def of(self, name: str) -> Path:
        """The folder of the pair of this ``id``."""
        return self.output_dir / name

    def complete(self, pair: Mapping[str, Any]) -> bool:
        """Whether a pair need not be registered again."""
        stored = {} if self.overwrite else self._read(pair["id"])
        return stored.get("files") == _files(pair)

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
        columns = {name: self.columns[name] for name, row in measures.items() if name in self.columns and len(row) > 1}
        write_measures(self.of(pair["id"]), measures, {**(about or {}), "files": _files(pair), "columns": columns})

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


def _files(pair: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(pair[key]) for key in _FILES if pair.get(key) not in (None, "")}
