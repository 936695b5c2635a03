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
"""The entries of a dataset JSON with ids, absolute paths, and the companions that an image has elsewhere in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.data.datalist import Entry, clean_path, is_pair, parse_pairs, parse_subjects, unique_ids
from common.data.truth import TRUTH_KEYS

__all__ = ["EntryReader"]

logger = logging.getLogger(__name__)


class EntryReader:
    """Turns the entries of one dataset JSON into entries with ids and absolute paths.

    Args:
        content: of the JSON.
        root: the folder that its paths start from.
        where: the JSON's path, for messages.
    """

    def __init__(self, content: Mapping[str, Any], root: Path, where: str) -> None:
        self.content, self.root, self.where = content, root, where
        self.ids: dict[str, str] = {}
        self.partners: dict[str, Entry] = {}

    def pairs(self, named: tuple[str, Any]) -> list[Entry]:
        """The pairs of one list, made consecutively where it lists single images."""
        name, entries = named
        if all(is_pair(entry) for entry in entries):
            return parse_pairs(entries, f"{self.where}: {name}")
        singles = parse_subjects(entries, f"{self.where}: {name}")
        logger.info("%s: '%s' lists %d single images: pairing each with the one before", self.where, name, len(singles))
        made = []
        for moving, fixed in pairwise(singles):
            pair: Entry = {}
            for role, entry in (("moving", moving), ("fixed", fixed)):
                pair |= {role if key == "image" else f"{role}_{key}": value for key, value in entry.items()}
            made.append(pair)
        return made

    def name_files(self, subjects: Iterable[Entry], pairs: Iterable[Entry]) -> None:
        """Give every image an id, and remember labels and masks so that pairs without them find them."""
        subjects = list(subjects)
        images = [entry["image"] for entry in subjects] + [entry[r] for entry in pairs for r in ("moving", "fixed")]
        self.ids = unique_ids(images)
        for entry in subjects:
            image = clean_path(entry["image"])
            self.ids[image] = str(entry.get("id", self.ids[image]))
            self.partners[image] = {key: entry[key] for key in ("label", "mask", "channels") if key in entry}

    def subject(self, entry: Entry) -> Entry:
        """A training subject with its id and absolute paths."""
        image = clean_path(entry["image"])
        paths: Entry = {key: self._absolute(entry[key]) for key in ("image", "label", "mask") if key in entry}
        if "channels" in entry:
            paths["channels"] = [self._absolute(path) for path in entry["channels"]]
        return {**entry, "id": self.ids[image], **paths}

    def pair(self, entry: Entry) -> Entry:
        """A pair with both ids, labels from the same image's other entries, and absolute paths."""
        result = dict(entry)
        for role in ("moving", "fixed"):
            image = clean_path(entry[role])
            result.setdefault(f"{role}_id", self.ids[image])
            for key, value in self._partner(image).items():
                result.setdefault(f"{role}_{key}", value)
            for key in (role, f"{role}_label", f"{role}_mask"):
                if key in result:
                    result[key] = self._absolute(result[key])
            if f"{role}_channels" in result:
                result[f"{role}_channels"] = [self._absolute(path) for path in result[f"{role}_channels"]]
        return result | {key: self._absolute(entry[key]) for key in TRUTH_KEYS if key in entry}

    def _partner(self, image: str) -> Entry:
        """Labels and masks of an image named alone: from another entry, else Learn2Reg's ``labelsTr/`` beside it."""
        if image not in self.partners:
            folder, name = Path(image).parent, Path(image).name
            self.partners[image] = {}
            for key, prefix in (("label", "labels"), ("mask", "masks")):
                if folder.name.startswith("images"):
                    candidate = folder.with_name(prefix + folder.name[len("images") :]) / name
                    if (self.root / candidate).is_file():
                        self.partners[image][key] = str(candidate)
        return self.partners[image]

    def _absolute(self, path: str) -> str:
        return str(self.root / path)
