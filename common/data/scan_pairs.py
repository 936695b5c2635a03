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
"""Pairs of scans that are registered as they come: each on a grid of its own, none loaded twice, none fatal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from common.data.pairs import _affine, _plain
from common.io.pair_folders import PairFolders

__all__ = ["ScanPairs"]

logger = logging.getLogger(__name__)

_IMAGES = ("moving", "fixed", "moving_label", "fixed_label", "initial_label")
_POINTS = ("moving_points", "fixed_points", "initial_points")
_NAMES = ("moving_id", "fixed_id", "id")
# What a transform may say of a pair beside its images.
_ABOUT = ("affine_matrix", "alignment", "timings", "warnings", "moving_frame", "fixed_frame")


class ScanPairs(Dataset):
    """A list of pairs of scans for inference.

    An item has ``moving``, ``fixed`` (1,*S), ``moving_label``, ``fixed_label`` (1,*S) int32 where a pair has both,
    ``moving_affine``, ``fixed_affine`` (d+1,d+1) float64, and the names ``moving_id``, ``fixed_id`` and ``id``. Where
    the transform gives them: landmarks ``moving_points`` and ``fixed_points`` (N,d) in voxels of their images,
    ``initial_points`` (N,d) and ``initial_label`` (1,*S) as they lay before an affine alignment, ``affine_matrix``
    (d+1,d+1) float64 and ``alignment``, how that was found, in words, ``timings`` (seconds by name), ``warnings``
    (lines), and ``moving_frame`` and ``fixed_frame`` of pairs that have them. Sizes differ from item to item, so a
    batch has one.

    Where ``folders`` are given, a list goes on whatever happens to one of its pairs: an item of nothing but names is a
    pair that was registered before, one with ``error`` a pair that cannot be loaded, and why.

    Args:
        data: pairs as :class:`common.data.PairList` has them.
        transform: from the files of a pair to its images, such as :class:`common.transforms.LoadScanPaird`.
        folders: where results go; None for a single pair, of which every error is raised.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        folders: PairFolders | None = None,
    ) -> None:
        self.data, self.transform, self.tolerant = data, transform, folders is not None
        # Now and not later: other processes complete folders while this one works.
        self.complete = set() if folders is None else _complete(data, folders)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.data[index]
        names = {key: str(pair[key]) for key in _NAMES if key in pair}
        if index in self.complete:
            return names
        try:
            return {**names, **self._load(pair)}
        except Exception as error:
            # MONAI says in which transform it happened; the reason is below that.
            reason: BaseException = error
            while type(reason) is RuntimeError and reason.__cause__ is not None:
                reason = reason.__cause__
            if not self.tolerant:
                raise RuntimeError(f"{pair['moving']} and {pair['fixed']} cannot be registered: {reason}") from error
            return {**names, "error": str(reason) or repr(reason)}

    def _load(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        loaded = self.transform(pair)
        item: dict[str, Any] = {}
        for key in (*_IMAGES, *_POINTS):
            if loaded.get(key) is not None and not isinstance(loaded[key], str):
                item[key] = _plain(loaded[key])
        item |= {key: loaded[key] for key in _ABOUT if loaded.get(key) is not None}
        return item | {f"{role}_affine": _affine(loaded[role]) for role in ("moving", "fixed")}


def _complete(data: Sequence[Mapping[str, Any]], folders: PairFolders) -> set[int]:
    """Which pairs need not be registered again; says so, and which do though they have results."""
    complete = {number for number, pair in enumerate(data) if folders.complete(pair)}
    again: dict[str, list[str]] = {}
    for number, pair in enumerate(data):
        changed = "" if number in complete or folders.overwrite else folders.changed(pair)
        if changed:
            again.setdefault(changed, []).append(str(pair["id"]))
    for changed, names in again.items():
        logger.info(
            "%d of %d pairs were registered before with %s: done again: %s",
            *(len(names), len(data), changed, ", ".join(names)),
        )
    if complete:
        logger.info(
            "%d of %d pairs are complete and skipped (--overwrite True does them again): %s",
            *(len(complete), len(data), ", ".join(str(data[number]["id"]) for number in sorted(complete))),
        )
    return complete
