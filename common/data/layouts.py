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
"""The same data set lies in different folders, depending on where it came from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.data.datalist import Entry, file_id

__all__ = ["list_folders", "natural_key", "use_layout"]

logger = logging.getLogger(__name__)

# The folder that a layout's {split} stands for, by the JSON's list.
_FOLDER_OF = {"training": "train", "validation": "val", "test": "test"}
_IMAGES = "*.nii*"


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which ``subject_10`` comes after ``subject_9``, on every file system."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def use_layout(content: dict[str, Any], root: Path) -> dict[str, Any]:
    """Rewrite the paths of a JSON to the layout that is on disk.

    ``layouts`` maps a name to patterns for ``image`` and ``label`` with ``{id}`` and ``{split}`` (train, val or
    test), each a list of alternatives, and may override ``shape`` and ``orientation``. The first layout is the one
    that the JSON's own paths follow, and the one that is assumed when no file is there at all.

    Args:
        content: of the JSON.
        root: folder of the data.

    Returns:
        the content, with other paths where another layout than the first one was found.
    """
    layouts: Mapping[str, Mapping[str, Any]] = content.get("layouts", {})
    probe = content["training"][0]["id"] if layouts and content.get("training") else ""
    for position, (name, layout) in enumerate(layouts.items()):
        if not any((root / path).is_file() for path in _paths(layout["image"], probe, "training")):
            continue
        logger.info("%s: found layout '%s' under %s", content.get("name"), name, root)
        changed = {key: layout[key] for key in ("shape", "orientation") if key in layout}
        if position:
            changed |= {key: _rewritten(content[key], layout, root, key) for key in _lists(content)}
        return {**content, **changed}
    return content


def list_folders(content: dict[str, Any], root: Path) -> dict[str, Any]:
    """Replace rules (``{"images": folder, "labels": folder, "count": n, "moving": id}``) by lists.

    Where an image has several channels, each in a file of its own, ``channels`` has what their names end in, such as
    ``["_0000", "_0001"]``: files with the first ending are listed, and each has its others under ``channels``; the
    label map is named without an ending.

    Args:
        content: of the JSON.
        root: folder of the data.

    Returns:
        the content, where each rule has become a list of subjects or, with ``moving``, of pairs with that atlas.

    Raises:
        FileNotFoundError: when a folder does not hold as many images as the rule says; has both numbers.
    """
    rules = {key: value for key, value in content.items() if isinstance(value, Mapping) and "images" in value}
    return {**content, **{key: _listed(rule, content, root) for key, rule in rules.items()}}


def _listed(rule: Mapping[str, Any], content: Mapping[str, Any], root: Path) -> list[Entry]:
    folder = root / rule["images"]
    endings: list[str] = rule.get("channels", [""])
    found = (path.name for path in folder.glob(_IMAGES))
    names = sorted((name for name in found if file_id(name).endswith(endings[0])), key=natural_key)
    if len(names) != rule.get("count", len(names)) or not names:
        raise FileNotFoundError(
            f"cohort '{content.get('name')}': expected {rule.get('count', 'some')} images in {folder}, found "
            f"{len(names)}. Get the data: {content.get('source')} (licence: {content.get('licence')})"
        )
    subjects: list[Entry] = []
    for name in names:
        stem = file_id(name).removesuffix(endings[0])
        extension = name.removeprefix(file_id(name))
        subject: Entry = {"id": stem, "image": f"{rule['images']}/{name}"}
        if len(endings) > 1:
            subject["channels"] = [f"{rule['images']}/{stem}{ending}{extension}" for ending in endings[1:]]
        subjects.append(subject | ({"label": f"{rule['labels']}/{stem}{extension}"} if "labels" in rule else {}))
    if "moving" not in rule:
        return subjects
    return [_pair(content["atlas"], subject) for subject in subjects]


def _pair(moving: Entry, fixed: Entry) -> Entry:
    pair: Entry = {}
    for role, subject in (("moving", moving), ("fixed", fixed)):
        pair |= {role if key == "image" else f"{role}_{key}": value for key, value in subject.items()}
    return pair


def _lists(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield key


def _rewritten(entries: list[Entry], layout: Mapping[str, Any], root: Path, key: str) -> list[Entry]:
    return [_moved(entry, layout, root, key.split("_")[0]) for entry in entries]


def _moved(entry: Entry, layout: Mapping[str, Any], root: Path, split: str) -> Entry:
    result = dict(entry)
    for kind in ("image", "label"):
        for role in ("", "moving", "fixed"):
            key = kind if not role else role if kind == "image" else f"{role}_{kind}"
            if key in entry:
                subject = entry[f"{role}_id" if role else "id"]
                result[key] = _existing(_paths(layout[kind], subject, split), root)
    return result


def _paths(patterns: list[str], subject: str, split: str) -> list[str]:
    return [pattern.format(id=subject, split=_FOLDER_OF[split]) for pattern in patterns]


def _existing(paths: list[str], root: Path) -> str:
    """The first that is there, else the first: the check for missing files then names it."""
    return next((path for path in paths if (root / path).is_file()), paths[0])
