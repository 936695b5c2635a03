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
"""Learn2Reg and Decathlon dataset JSONs in, one plain form out.

Accepted as they are: Decathlon ``dataset.json``; Learn2Reg challenge JSONs with ``training``,
``training_paired_images``, ``registration_val`` or ``validation`` pairs; MONAI datalists; and the JSONs of
``data_splits/``. Synonyms are resolved here, so that the rest of the code knows one name for each thing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["file_id", "parse_labels", "parse_pairs", "parse_subjects", "read_json", "unique_ids"]

logger = logging.getLogger(__name__)

Entry = dict[str, Any]

SUBJECT_KEYS = {"image": ("image",), "label": ("label", "seg", "segmentation"), "mask": ("mask",)}
PAIR_KEYS = {
    f"{role}{suffix}": tuple(f"{role}{name}" for name in names)
    for role in ("moving", "fixed")
    for suffix, names in {
        "": ("", "_image"),
        "_label": ("_label", "_seg"),
        "_mask": ("_mask",),
        "_id": ("_id",),
    }.items()
}
_EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a dataset JSON.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not JSON or its top level is no object; the message has the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no dataset JSON at {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object with 'training' and others, found a {type(content).__name__}")
    return content


def file_id(path: str) -> str:
    """The file's name without folder and extension: ``./imagesTr/case_01.nii.gz`` is ``case_01``."""
    name = Path(path).name
    for extension in _EXTENSIONS:
        if name.lower().endswith(extension):
            return name[: -len(extension)]
    return Path(name).stem


def unique_ids(paths: Iterable[str]) -> dict[str, str]:
    """An id for each different file: its name, or its path where names repeat (``subject1/brain.nii.gz``)."""
    relative = sorted({clean_path(path) for path in paths})
    names = [file_id(path) for path in relative]
    if len(set(names)) == len(names):
        return dict(zip(relative, names, strict=True))
    return {path: str(Path(path).parent / name) for path, name in zip(relative, names, strict=True)}


def clean_path(path: str) -> str:
    """A JSON's ``./imagesTr/x`` and ``imagesTr/x`` are the same file."""
    return Path(path).as_posix()


def parse_labels(labels: Any) -> dict[int, str]:
    """Label names by value from any of the forms in use.

    ``{"1": "Anterior"}`` (Decathlon), ``{"Anterior": 1}`` (nnU-Net), ``["background", "Anterior"]``, and Learn2Reg's
    one dict for each modality.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_labels({"0": "background", "1": "Anterior"})
        {0: 'background', 1: 'Anterior'}
        >>> parse_labels({"Anterior": 1})
        {1: 'Anterior'}
        >>> parse_labels({"0": {"1": "liver"}, "1": {"2": "spleen"}})
        {1: 'liver', 2: 'spleen'}
    """
    if labels is None:
        return {}
    if isinstance(labels, list):
        return {value: str(name) for value, name in enumerate(labels)}
    if not isinstance(labels, Mapping):
        raise ValueError(f"labels: expected an object or a list, found {labels!r}")
    named: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, (Mapping, list)):
            named |= parse_labels(value)
        elif str(key).lstrip("-").isdigit():
            named[int(key)] = str(value)
        elif isinstance(value, int):
            named[value] = str(key)
        else:
            raise ValueError(f"labels: expected a number for '{key}' or as its value, found {value!r}")
    return dict(sorted(named.items()))


def is_pair(entry: Any) -> bool:
    """Whether a JSON's entry is a pair rather than a subject."""
    return isinstance(entry, Mapping) and any(name in entry for name in PAIR_KEYS["fixed"])


def parse_subjects(entries: Iterable[Any], where: str) -> list[Entry]:
    """Subjects with ``image`` and, where given and not null, ``label``, ``mask``; other keys are kept.

    Raises:
        ValueError: when an entry has no image; the message has the list's name and the entry.
    """
    return [_named(entry, SUBJECT_KEYS, ("image",), f"{where}[{index}]") for index, entry in enumerate(entries)]


def parse_pairs(entries: Iterable[Any], where: str) -> list[Entry]:
    """Pairs with ``moving``, ``fixed`` and, where given, ``*_label``, ``*_mask``, ``*_id``; other keys are kept.

    Raises:
        ValueError: when an entry lacks one side.
    """
    return [_named(entry, PAIR_KEYS, ("moving", "fixed"), f"{where}[{index}]") for index, entry in enumerate(entries)]


def _named(entry: Any, synonyms: Mapping[str, tuple[str, ...]], required: tuple[str, ...], where: str) -> Entry:
    if isinstance(entry, str) and required == ("image",):
        entry = {"image": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object with {list(required)}, found {entry!r}")
    own: dict[Any, str] = {name: key for key, names in synonyms.items() for name in names}
    result = {own.get(str(name), str(name)): value for name, value in entry.items() if value is not None}
    for key in required:
        if not isinstance(result.get(key), str):
            raise ValueError(f"{where}: expected a path under '{key}', found {result.get(key)!r} in {dict(entry)!r}")
    return result
