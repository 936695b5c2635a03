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
"""Where a named data set's list and files are, and where to get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import data_splits_root
from common.data.datalist import read_json
from common.data.download import cache_folder

__all__ = ["EMBEDDED", "default_folder", "json_path", "require_files"]

# Cohorts that are made on first use.
EMBEDDED = ("synthetic", "cine", "sliding", "contrast")
_SHOWN = 5


def json_path(name_or_json: str | Path) -> Path:
    """The JSON of a name, or the path itself.

    Raises:
        ValueError: for an unknown name; lists the known ones.
    """
    known = sorted(path.stem for path in data_splits_root().glob("*.json"))
    if str(name_or_json) in known:
        return data_splits_root() / f"{name_or_json}.json"
    if str(name_or_json).endswith(".json"):
        return Path(name_or_json)
    made = ", ".join(f"'{name}'" for name in EMBEDDED)
    raise ValueError(f"unknown cohort '{name_or_json}': expected {made}, one of {known} or a path that ends in .json")


def default_folder(name: str, path: Path, download: bool) -> Path:
    """The folder of the data where none is given: beside a user's own JSON, or where downloads go.

    Raises:
        ValueError: for a shipped JSON whose data nobody can fetch; says where to apply.
    """
    if path.parent != data_splits_root():
        return path.parent
    if download:
        return cache_folder()
    raise ValueError(f"cohort '{name}' needs dataset_dir, the folder of its data. {where_to_get(read_json(path))}")


def where_to_get(content: Mapping[str, Any]) -> str:
    """Source and licence that a JSON states, for messages."""
    return f"Get the data: {content.get('source', 'see its JSON')} (licence: {content.get('licence', 'unknown')})"


def require_files(name: str, files: Sequence[str], dataset_dir: str, content: Mapping[str, Any]) -> None:
    """Check that all files of a cohort are there.

    Raises:
        FileNotFoundError: names the first that are not, and where to get them.
    """
    missing = [path for path in files if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"cohort '{name}': {len(missing)} of {len(files)} files are missing under {dataset_dir}, "
            f"such as {[str(Path(p)) for p in missing[:_SHOWN]]}. {where_to_get(content)}"
        )
