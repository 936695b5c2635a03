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
"""Data sets with one folder a subject, whose ids are known only to those who have the files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.datalist import Entry
from common.data.layouts import natural_key
from common.data.pair_lists import find_pair_lists

__all__ = ["list_subject_folders"]

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
_ROLES = {"moving": "ES", "fixed": "ED"}
_SHOWN = 5


def list_subject_folders(content: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Replace a rule under ``subject_folders`` by lists.

    The rule has ``splits``, the names that the folders of each split may have, such as ``{"test": ["testing"]}``, and
    ``hold_out``, the parts of the subjects that become ``test`` and ``validation`` where there is no folder for them;
    the others train. Which subjects those are follows from their sorted names and a fixed seed.

    Cine data give ``moving`` and ``fixed``, each with alternatives for ``image`` and ``label``; each subject becomes a
    pair. Patterns may hold ``{id}``, the folder's name, and ``{ED}`` and ``{ES}``, two-digit frame numbers from the
    file that ``frames`` names (``ED: 1`` a line, as in ACDC's ``Info.cfg``). Data with one scan a subject give
    ``image``, ``label`` and perhaps ``mask`` instead: training subjects, and a ring of pairs for validation and test,
    in which every subject is once moving and once fixed. With ``to_atlas`` every subject is registered to one of them,
    the first to train, instead. ``pair_lists`` names the files that may list a split's subjects and the atlas; see
    :mod:`common.data.pair_lists`.

    Args:
        content: of the JSON.
        root: folder of the data.

    Returns:
        the content with ``training``, ``validation`` and ``test``, and with ``atlas`` where there is one; as it is when
        it has no such rule.

    Raises:
        FileNotFoundError: when there is no subject folder, some that are listed are missing, or some lack an image;
            names them.
        ValueError: when a frame file does not give the frames, or a list of pairs is unusable.
    """
    rule: Mapping[str, Any] | None = content.get("subject_folders")
    if rule is None:
        return dict(content)
    atlas, lists = find_pair_lists(rule.get("pair_lists", {}), root)
    folders = _split(rule, _listed(lists, atlas, content, root) if lists else _find(rule, content, root))
    read = _pair if "moving" in rule else _subject
    atlas_folder = _atlas_folder(atlas, folders, content, root) if rule.get("to_atlas") else None
    listed: dict[str, list[Entry]] = {}
    for split, members in folders.items():
        listed[split] = [read(rule, folder, root) for folder in members if folder != atlas_folder]
    one = [_subject(rule, atlas_folder, root)] if atlas_folder is not None else []
    _require_images({**listed, "atlas": one}, content, root)
    _mention_unlabelled({**listed, "atlas": one}, content)
    if one:
        return {**content, **listed, "atlas": one[0]} | {
            split: [_side_by_side(entry, one[0]) for entry in listed[split]] for split in ("validation", "test")
        }
    if "moving" not in rule:
        listed |= {split: _ring(listed[split]) for split in ("validation", "test")}
    return {**content, **listed}


def _listed(
    lists: Mapping[str, Sequence[str]], atlas: str | None, content: Mapping[str, Any], root: Path
) -> dict[str, list[Path]]:
    """The folders that lists of ids name, by split. A list of test subjects alone leaves the others to train."""
    names = {split: list(lists.get(split, ())) for split in SPLITS}
    if not names["training"]:
        taken = {atlas, *(name for members in names.values() for name in members)}
        names["training"] = [folder.name for folder in _folders(root) if folder.name not in taken]
    folders = {split: [root / name for name in members] for split, members in names.items()}
    missing = [folder.name for members in folders.values() for folder in members if not folder.is_dir()]
    if missing:
        raise FileNotFoundError(
            f"cohort '{content.get('name')}': {len(missing)} subjects that are listed have no folder in {root}, such "
            f"as {missing[:_SHOWN]}. Get the data: {content.get('source')} (licence: {content.get('licence')})"
        )
    return folders


def _atlas_folder(
    atlas: str | None, folders: Mapping[str, Sequence[Path]], content: Mapping[str, Any], root: Path
) -> Path:
    if atlas is None:
        chosen = folders["training"][0]
        logger.warning("cohort '%s': no list names the atlas, '%s' is taken", content.get("name"), chosen.name)
        return chosen
    for folder in (folder for members in folders.values() for folder in members):
        if folder.name == atlas:
            return folder
    if not (root / atlas).is_dir():
        raise FileNotFoundError(f"cohort '{content.get('name')}': the atlas '{atlas}' has no folder in {root}")
    return root / atlas


def _find(rule: Mapping[str, Any], content: Mapping[str, Any], root: Path) -> dict[str, list[Path]]:
    """Subject folders by split; all under ``training`` where the data are not split."""
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for split, names in rule.get("splits", {}).items():
        for name in names:
            found[split] = found[split] or _folders(root / name)
    if not found["training"]:
        taken = {name for names in rule.get("splits", {}).values() for name in names}
        found["training"] = [folder for folder in _folders(root) if folder.name not in taken]
    if not found["training"]:
        raise FileNotFoundError(
            f"cohort '{content.get('name')}': no subject folders in {root}. Get the data: {content.get('source')} "
            f"(licence: {content.get('licence')})"
        )
    return found


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    inside = [path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(inside, key=lambda path: natural_key(path.name))


def _split(rule: Mapping[str, Any], found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Set subjects aside for the splits that have no folder; the parts are of the subjects that would else train."""
    pool = found["training"]
    order = [int(position) for position in np.random.RandomState(0).permutation(len(pool))]
    result, start = dict(found), 0
    for split, part in rule.get("hold_out", {}).items():
        if not found[split]:
            count = max(1, math.floor(part * len(pool) + 0.5))
            result[split] = [pool[position] for position in sorted(order[start : start + count])]
            start += count
    result["training"] = [pool[position] for position in sorted(order[start:])]
    if not result["training"]:
        raise FileNotFoundError(
            f"{len(pool)} subject folder(s) in {pool[0].parent} are too few to set some aside and train on the others"
        )
    return result


def _subject(rule: Mapping[str, Any], folder: Path, root: Path) -> Entry:
    return {"id": folder.name, **_files(rule, folder, root, {})}


def _pair(rule: Mapping[str, Any], folder: Path, root: Path) -> Entry:
    """One subject's pair: systole moves to diastole unless the rule says otherwise."""
    frames = _frames(folder / rule["frames"]) if "frames" in rule else {}
    pair: Entry = {"subject": folder.name}
    for role, phase in _ROLES.items():
        files = _files(rule[role], folder, root, frames)
        pair |= {f"{role}_id": f"{folder.name}_{phase}"}
        pair |= {role if key == "image" else f"{role}_{key}": value for key, value in files.items()}
    return pair


def _files(patterns: Mapping[str, Sequence[str]], folder: Path, root: Path, frames: Mapping[str, str]) -> Entry:
    """The first alternative that is there; an image that is not there keeps its first name, a label is left out."""
    files: Entry = {}
    for key in ("image", "label", "mask"):
        names = [name.format(id=folder.name, **frames) for name in patterns.get(key, ())]
        there = [name for name in names if (folder / name).is_file()]
        if there or key == "image":
            files[key] = (folder.relative_to(root) / (there or names)[0]).as_posix()
    return files


def _frames(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it tells the frames of diastole and systole")
    pairs = [line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line]
    known = {key.strip(): value.strip() for key, value in pairs}
    if not all(known.get(phase, "").isdigit() for phase in ("ED", "ES")):
        raise ValueError(f"{path}: expected 'ED: <number>' and 'ES: <number>', found {known}")
    return {phase: f"{int(known[phase]):02d}" for phase in ("ED", "ES")}


def _require_images(listed: Mapping[str, list[Entry]], content: Mapping[str, Any], root: Path) -> None:
    entries = [entry for members in listed.values() for entry in members]
    images = [entry[key] for entry in entries for key in ("image", *_ROLES) if key in entry]
    missing = [image for image in images if not (root / image).is_file()]
    if missing:
        raise FileNotFoundError(
            f"cohort '{content.get('name')}': {len(missing)} of {len(images)} images are missing under {root}, such as "
            f"{missing[:_SHOWN]}. Get the data: {content.get('source')} (licence: {content.get('licence')})"
        )


def _mention_unlabelled(listed: Mapping[str, list[Entry]], content: Mapping[str, Any]) -> None:
    known = {
        split: [all(f"{role}_label" in e for role in _ROLES) if "moving" in e else "label" in e for e in members]
        for split, members in listed.items()
    }
    if not any(any(labels) for labels in known.values()):
        return
    for split, labels in known.items():
        names = [e.get("subject", e.get("id")) for e, there in zip(listed[split], labels, strict=True) if not there]
        if names:
            logger.warning(
                "cohort '%s': %d of %d %s subjects have no label map, such as %s: no label is used in that split",
                *(content.get("name"), len(names), len(labels), split, names[:_SHOWN]),
            )


def _ring(subjects: Sequence[Entry]) -> list[Entry]:
    """Each subject registered to the one before it in the list, the first to the last."""
    return [
        _side_by_side(moving, fixed) for fixed, moving in zip(subjects, [*subjects[1:], *subjects[:1]], strict=True)
    ]


def _side_by_side(moving: Entry, fixed: Entry) -> Entry:
    pair: Entry = {}
    for role, entry in (("moving", moving), ("fixed", fixed)):
        pair |= {role if key == "image" else f"{role}_{key}": value for key, value in entry.items()}
    return pair
