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
"""Find what is wrong with a cohort before any training time is lost on it.

Every problem names the file, what was found and what was expected. All problems are collected, so that one pass over
the data tells the whole story. Nothing is corrected.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.data.cohort import Cohort
from common.data.datalist import Entry
from common.io import Scan, grid_difference, load_image

__all__ = ["CohortReport", "IntegrityError", "check_integrity"]

logger = logging.getLogger(__name__)

SPLITS = ("training", "validation", "test")
_SHOWN = 20
_PROGRESS_FROM = 50


class IntegrityError(ValueError):
    """A cohort that should not be trained on.

    Attributes:
        problems: all of them, one a line; the message shows the first ones.
    """

    def __init__(self, name: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        shown = "\n".join(f"  - {problem}" for problem in self.problems[:_SHOWN])
        more = f"\n  ... and {len(self.problems) - _SHOWN} more" if len(self.problems) > _SHOWN else ""
        super().__init__(f"cohort '{name}' has {len(self.problems)} problem(s):\n{shown}{more}")


@dataclass
class CohortReport:
    """What a cohort consists of.

    Attributes:
        name: of the cohort.
        images, labels: number of different files of each kind that were read.
        splits: number of different subjects in each split.
        shapes, spacings, orientations: how many images have which.
        label_voxels: how many voxels have which label value, over all label files.
        intensity: smallest and largest value of any image.
        problems: what is wrong, empty when nothing is.
    """

    name: str
    images: int = 0
    labels: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    spacings: Counter[tuple[float, ...]] = field(default_factory=Counter)
    orientations: Counter[str] = field(default_factory=Counter)
    label_voxels: Counter[int] = field(default_factory=Counter)
    intensity: tuple[float, float] = (float("inf"), float("-inf"))
    problems: list[str] = field(default_factory=list)

    def add(self, other: CohortReport) -> None:
        """Take in what was found elsewhere, such as in another file."""
        self.images += other.images
        self.labels += other.labels
        for name in ("shapes", "spacings", "orientations", "label_voxels"):
            getattr(self, name).update(getattr(other, name))
        low, high = other.intensity
        self.intensity = (min(self.intensity[0], low), max(self.intensity[1], high))
        self.problems += other.problems

    def __str__(self) -> str:
        def listed(counts: Counter[Any]) -> str:
            shown = ", ".join(f"{value} ({count})" for value, count in counts.most_common(4))
            return shown + (", ..." if len(counts) > 4 else "")

        return "\n".join(
            [
                f"cohort '{self.name}': {self.images} images, {self.labels} label maps",
                f"  subjects: {', '.join(f'{split} {count}' for split, count in self.splits.items())}",
                f"  shapes: {listed(self.shapes)}",
                f"  spacings: {listed(self.spacings)}",
                f"  orientations: {listed(self.orientations)}",
                f"  intensities: {self.intensity[0]:g} to {self.intensity[1]:g}",
                f"  labels: {sorted(self.label_voxels)}",
                f"  problems: {len(self.problems)}",
            ]
        )


def check_integrity(
    cohort: Cohort,
    splits: Iterable[str] = SPLITS,
    *,
    labels: Iterable[int] | None = None,
    raise_errors: bool = True,
    workers: int = 2,
    progress: bool = True,
) -> CohortReport:
    """Read every file of a cohort once and say what is wrong.

    Checked: missing and unreadable files; shape, spacing and orientation where the cohort states them; NaN, infinity,
    constant images; labels that are not integers or not among the known ones; label maps on another grid than their
    image; the same id or the same voxels twice in the training list; the same subject, by id or by voxels, in training
    and in validation or test.

    Args:
        cohort: to check.
        splits: which of ``training``, ``validation``, ``test``.
        labels: the values that may occur. Default: those of the cohort; any, if it names none.
        raise_errors: raise at the end when something is wrong; else leave it in the report.
        workers: threads that read files.
        progress: show a bar for more than 50 images.

    Returns:
        the report.

    Raises:
        IntegrityError: with all problems.
        ValueError: for an unknown split.
    """
    chosen = list(splits)
    unknown = [split for split in chosen if split not in SPLITS]
    if unknown:
        raise ValueError(f"unknown split(s) {unknown}, expected some of {list(SPLITS)}")
    members = {split: list(_subjects(cohort, split)) for split in chosen}
    known = set(labels) if labels is not None else set(cohort.label_map or cohort.labels)
    files = {entry["image"]: entry for split in chosen for entry in members[split]}
    report, digests = CohortReport(cohort.name), dict[str, str]()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checked = pool.map(partial(_check, cohort, known), files.values())
        bar = tqdm(checked, f"checking {cohort.name}", len(files), disable=not progress or len(files) <= _PROGRESS_FROM)
        for part, found in bar:
            report.add(part)
            digests |= found
    report.splits = {split: len({entry["image"] for entry in members[split]}) for split in chosen}
    if "training" in chosen:
        report.problems += _repeated(cohort.training, digests)
    report.problems += _leaks(members, digests, cohort.atlas)
    logger.info("%s", report)
    if report.problems and raise_errors:
        raise IntegrityError(cohort.name, report.problems)
    return report


def _check(cohort: Cohort, labels: set[int], entry: Entry) -> tuple[CohortReport, dict[str, str]]:
    checker = _Checker(cohort, labels)
    checker.check(entry)
    return checker.report, checker.digests


class _Checker:
    """Reads one subject and writes down what it finds."""

    def __init__(self, cohort: Cohort, labels: set[int]) -> None:
        self.cohort, self.labels = cohort, labels
        self.report = CohortReport(cohort.name)
        self.digests: dict[str, str] = {}

    def check(self, entry: Entry) -> None:
        image = self._read(entry["image"])
        if image is not None:
            self.report.images += 1
            self._geometry(image)
            self._intensity(image)
            self.digests[entry["image"]] = digest(image.array)
        for path in entry.get("channels", ()):
            self._channel(path, image)
        for key in ("label", "mask"):
            if key in entry:
                self._companion(entry[key], image, is_label=key == "label")

    def _problem(self, path: str | Path, text: str) -> None:
        self.report.problems.append(f"{path}: {text}")

    def _read(self, path: str) -> Scan | None:
        try:
            return load_image(path)
        except FileNotFoundError:
            self._problem(path, "the file is missing")
        except (OSError, ValueError) as error:
            self._problem(path, f"unreadable: {error}")
        return None

    def _geometry(self, scan: Scan) -> None:
        shape = tuple(int(n) for n in scan.array.shape)
        spacing = tuple(round(n, 4) for n in scan.spacing)
        self.report.shapes[shape] += 1
        self.report.spacings[spacing] += 1
        self.report.orientations[scan.orientation] += 1
        cohort = self.cohort
        if cohort.shape is not None and shape != cohort.shape:
            self._problem(scan.path, f"shape {shape}, expected {cohort.shape}")
        if cohort.spacing is not None and (
            len(spacing) != len(cohort.spacing) or not np.allclose(spacing, cohort.spacing, rtol=1e-3)
        ):
            self._problem(scan.path, f"spacing {spacing} mm, expected {cohort.spacing}")
        if cohort.orientation is not None and scan.orientation != cohort.orientation:
            self._problem(scan.path, f"orientation {scan.orientation}, expected {cohort.orientation}")

    def _intensity(self, scan: Scan) -> None:
        array = scan.array
        if array.dtype.kind == "f":
            bad = int(array.size - np.isfinite(array).sum())
            if bad:
                nan = int(np.isnan(array).sum())
                self._problem(scan.path, f"{nan} NaN and {bad - nan} infinite of {array.size} voxels, expected none")
                return
        low, high = float(array.min()), float(array.max())
        if low == high:
            self._problem(scan.path, f"constant image, every voxel is {low:g}")
        self.report.intensity = (low, high)

    def _channel(self, path: str, image: Scan | None) -> None:
        channel = self._read(path)
        if channel is None:
            return
        self._intensity(channel)
        if image is not None and (difference := grid_difference(image, channel)):
            self._problem(path, f"not on the grid of its first channel {image.path} (first != this): {difference}")

    def _companion(self, path: str, image: Scan | None, is_label: bool) -> None:
        label = self._read(path)
        if label is None:
            return
        if image is not None and (difference := grid_difference(image, label)):
            self._problem(path, f"not on the grid of its image {image.path} (image != label): {difference}")
        if is_label:
            self.report.labels += 1
            self._values(label)

    def _values(self, label: Scan) -> None:
        values, counts = np.unique(label.array, return_counts=True)
        odd = values[~np.isfinite(values) | (values != np.round(values))] if values.dtype.kind == "f" else values[:0]
        if odd.size:
            shown = [round(float(value), 4) for value in odd[:5]]
            self._problem(
                label.path, f"{odd.size} label value(s) that are no integers such as {shown}, expected integers"
            )
            return
        found = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
        self.report.label_voxels.update(found)
        strange = sorted(set(found) - self.labels - {0})
        if self.labels and strange:
            self._problem(label.path, f"unknown label(s) {strange}, expected some of {sorted(self.labels)}")


def digest(array: np.ndarray) -> str:
    """sha256 of shape and voxel values: equal for the same image under another name, header or compression."""
    # As float32, so that the same values stored as bytes and as floats are the same image.
    values = np.ascontiguousarray(array, dtype=np.float32)
    return hashlib.sha256(str(array.shape).encode() + values.tobytes()).hexdigest()


def _subjects(cohort: Cohort, split: str) -> Iterator[Entry]:
    if split == "training":
        yield from cohort.training
        yield from _sides(cohort.training_pairs)
    else:
        yield from _sides(getattr(cohort, split))


def _sides(pairs: Iterable[Entry]) -> Iterator[Entry]:
    for pair in pairs:
        for role in ("moving", "fixed"):
            keys = ("label", "mask", "channels")
            companions = {key: pair[f"{role}_{key}"] for key in keys if f"{role}_{key}" in pair}
            yield {"id": pair[f"{role}_id"], "image": pair[role], **companions}


def _repeated(training: list[Entry], digests: dict[str, str]) -> list[str]:
    """Subjects that are in the training list twice: by path, by id, by voxels."""
    times = Counter(entry["image"] for entry in training)
    problems = [f"{image}: listed {count} times in training" for image, count in times.items() if count > 1]
    ids, contents = dict[str, str](), dict[str, str]()
    for image, entry in {entry["image"]: entry for entry in training}.items():
        name, content = entry["id"], digests.get(image, image)
        if ids.setdefault(name, image) != image:
            problems.append(f"{image}: its id '{name}' is also that of {ids[name]}")
        if contents.setdefault(content, image) != image:
            problems.append(f"{image}: has the same voxels as {contents[content]}")
    return problems


def _leaks(members: dict[str, list[Entry]], digests: dict[str, str], atlas: Entry | None) -> list[str]:
    """Subjects that an earlier split has too. The atlas belongs to all of them."""
    problems = []
    order = [split for split in SPLITS if split in members]
    for earlier, later in combinations(order, 2):
        first, second = ({e["image"]: e["id"] for e in members[split]} for split in (earlier, later))
        ids = {name: image for image, name in first.items()}
        contents = {digests.get(image, image): image for image in first}
        for image, name in second.items():
            if atlas is not None and image == atlas["image"]:
                continue
            content = digests.get(image, image)
            if name in ids:
                problems.append(f"{image}: subject '{name}' of {later} is also in {earlier} ({ids[name]})")
            elif content in contents:
                problems.append(f"{image}: of {later} has the same voxels as {contents[content]} of {earlier}")
    return problems
