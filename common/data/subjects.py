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
"""The subjects that a dataset loads, each once, however many pairs it is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["split_pairs", "with_ids"]


def with_ids(data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Subjects that all have an id, their image's path where they came without.

    Raises:
        ValueError: when two have the same one.
    """
    subjects = [{**entry, "id": str(entry.get("id", entry["image"]))} for entry in data]
    seen: dict[str, Any] = {}
    for subject in subjects:
        if subject["id"] in seen:
            raise ValueError(
                f"two subjects have the id '{subject['id']}': {seen[subject['id']]} and {subject['image']}"
            )
        seen[subject["id"]] = subject["image"]
    return subjects


def split_pairs(data: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """Pairs to subjects and positions, so that a subject in many pairs is loaded and kept once."""
    positions: dict[tuple[str, str], int] = {}
    subjects: list[dict[str, Any]] = []
    pairs = []
    for entry in data:
        pair = []
        for role in ("moving", "fixed"):
            subject = {"image": entry[role], "id": str(entry.get(f"{role}_id", entry[role]))}
            subject |= {k: entry[f"{role}_{k}"] for k in ("label", "mask", "channels") if entry.get(f"{role}_{k}")}
            place = positions.setdefault((subject["id"], str(subject["image"])), len(subjects))
            if place == len(subjects):
                subjects.append(subject)
            else:
                subjects[place] = {**subject, **subjects[place]}
            pair.append(place)
        pairs.append((pair[0], pair[1]))
    return subjects, pairs
