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
"""One subject of a cohort as its atlas: everyone is registered to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.data.datalist import Entry
from common.data.subjects import split_pairs

__all__ = ["choose_atlas", "pairs_to_atlas"]


def choose_atlas(
    wanted: str | bool, own: Entry | None, suggested: str | None, subjects: Sequence[Mapping[str, Any]], name: str
) -> Entry:
    """The subject that serves as atlas.

    Args:
        wanted: a subject's id, or True for the cohort's own atlas or else the one that its JSON suggests.
        own: the atlas that the cohort has already.
        suggested: the id of ``suggested_atlas`` in the JSON.
        subjects: of training, validation and test.
        name: of the cohort, for messages.

    Returns:
        the entry, with ``id`` and ``image``.

    Raises:
        ValueError: for an unknown id, or when there is neither an own nor a suggested atlas.
    """
    if wanted is True:
        if own is not None:
            return own
        if suggested is None:
            raise ValueError(f"cohort '{name}' suggests no atlas: name one by the id of a subject")
        wanted = suggested
    known = [*([own] if own is not None else []), *subjects]
    for subject in known:
        if str(subject["id"]) == str(wanted):
            return dict(subject)
    raise ValueError(
        f"cohort '{name}' has no subject '{wanted}' to be the atlas; its {len(known)} ids start with "
        f"{[subject['id'] for subject in known[:3]]}"
    )


def pairs_to_atlas(pairs: Sequence[Entry], atlas: Mapping[str, Any]) -> list[Entry]:
    """Every subject of some pairs, once, as the moving one of a pair with the atlas.

    Pairs that all have the atlas on the fixed side stay as they are, with what is known of them.

    Args:
        pairs: of a cohort.
        atlas: its ``id``, ``image`` and perhaps ``label``, ``mask`` and ``channels``.

    Returns:
        the pairs, in the order in which the subjects come first.
    """
    image = str(atlas["image"])
    if all(str(pair["fixed"]) == image for pair in pairs):
        return list(pairs)
    fixed = {("fixed" if key == "image" else f"fixed_{key}"): value for key, value in _kept(atlas).items()}
    subjects = (subject for subject in split_pairs(pairs)[0] if str(subject["image"]) != image)
    return [
        {("moving" if key == "image" else f"moving_{key}"): value for key, value in _kept(subject).items()} | fixed
        for subject in subjects
    ]


def _kept(subject: Mapping[str, Any]) -> Entry:
    return {key: subject[key] for key in ("id", "image", "label", "mask", "channels") if subject.get(key)}
