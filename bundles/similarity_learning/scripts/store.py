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
"""Where q(v) of each pair is kept between visits, so that a later epoch goes on from the former one's result."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.handlers import load_checkpoint, save_checkpoint
from common.handlers.output import claim_folder, gather_objects, is_first_rank, rank

from .posterior import LowRankGaussian

__all__ = ["PosteriorStore"]

logger = logging.getLogger(__name__)

Pair = tuple[str, str]

_PLACES = ("memory", "disk", "none")
_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_FILE = re.compile(r".+\.g(\d+)\.r(\d+)\.pt")


class PosteriorStore:
    """The distributions q(v), by the ids of the moving and of the fixed image.

    A run that is resumed goes on from the distributions its checkpoint was written with, whatever was stored since.
    In memory they are part of the checkpoint. On disk the checkpoint lists files, and what a listed file holds never
    changes: newer distributions go to new files, and old files are removed when no checkpoint lists them any more.
    So up to two files a pair are kept (three numbers of float32 or float16 for each parameter, in voxels).

    With several processes each reads what all had stored by the last :meth:`synchronise`, and what it has stored itself
    since. Of a pair that several have visited in between, the lowest rank's result counts. In memory every process
    keeps all pairs; on disk all must see the same folder.

    Args:
        where: ``"memory"``, ``"disk"``, or ``"none"``: every visit starts afresh.
        folder: of the files, for ``"disk"``. One run owns it.
        dtype: ``"float32"`` or ``"float16"``, which halves what is kept.

    Raises:
        ValueError: for an unknown ``where`` or ``dtype``, or when a folder is missing or not needed.
    """

    def __init__(self, where: str = "memory", folder: str | Path | None = None, dtype: str = "float32") -> None:
        if where not in _PLACES:
            raise ValueError(f"a store is one of {list(_PLACES)}, got {where!r}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {dtype!r}")
        if where == "disk" and folder is None:
            raise ValueError("a store on disk needs a folder")
        self.where, self.dtype = where, dtype
        self._files = _Files(Path(folder)) if where == "disk" and folder is not None else None
        self._shared: dict[str, Any] = {}  # by pair, what every process knows: states in memory or names of files
        self._own: dict[str, Any] = {}  # what this process has stored since
        self._checkpointed: dict[str, Any] = {}
        self._is_tidy = True

    def __len__(self) -> int:
        return len({**self._shared, **self._own})

    def __contains__(self, pair: Pair) -> bool:
        key = _key(pair)
        return key in self._own or key in self._shared

    def get(self, pairs: Sequence[Pair], device: torch.device | str = "cpu") -> LowRankGaussian:
        """The distribution of a batch of pairs, a copy in float32.

        Args:
            pairs: ids of moving and fixed image, B of them.
            device: where it goes.

        Raises:
            KeyError: when a pair was never stored.
            ValueError: when their sizes differ, so that they make no batch.
        """
        missing = [pair for pair in pairs if pair not in self]
        if missing:
            raise KeyError(f"no q(v) is stored of {missing[:3]}; there are {len(self)} pairs")
        states = [self._read({**self._shared, **self._own}[_key(pair)]) for pair in pairs]
        shapes = {tuple(state["factors"].shape) for state in states}
        if len(shapes) > 1:
            raise ValueError(f"the q(v) stored of {list(pairs)} have different sizes, {sorted(shapes)}")
        return LowRankGaussian.from_state(
            {name: torch.cat([state[name] for state in states]).to(device, torch.float32) for name in states[0]}
        )

    def put(self, pairs: Sequence[Pair], posterior: LowRankGaussian) -> None:
        """Keep the distribution of a batch of pairs.

        Raises:
            ValueError: when it is not of as many pairs as there are ids.
        """
        if len(pairs) != len(posterior.mean):
            raise ValueError(f"{len(pairs)} pairs came with a q(v) of {len(posterior.mean)}")
        if self.where == "none":
            return
        self.tidy()
        for item, pair in enumerate(pairs):
            state = {
                name: tensor[item : item + 1].detach().to("cpu", _DTYPES[self.dtype], copy=True)
                for name, tensor in posterior.state().items()
            }
            self._own[_key(pair)] = state if self._files is None else self._files.write(pair, state)

    def synchronise(self) -> None:
        """Share among processes what each has stored; all must call this at the same time, at the end of an epoch."""
        for stored in reversed(gather_objects(self._own)):
            self._shared.update(stored)
        self._own = {}
        if self._files is not None:
            self._files.next_generation()
        self._is_tidy = False

    def tidy(self) -> None:
        """Remove files that neither this run nor its last checkpoint needs; once after each :meth:`synchronise`.

        Only the first rank does, since only that one is certain that the checkpoint has been written.
        """
        if not self._is_tidy and self._files is not None and is_first_rank():
            self._files.remove_others({*self._shared.values(), *self._checkpointed.values()})
        self._is_tidy = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: what was known at the last :meth:`synchronise`."""
        self._checkpointed = dict(self._shared)
        return {"where": self.where, "pairs": dict(self._shared)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint.

        Raises:
            ValueError: when that run kept its distributions elsewhere.
            FileNotFoundError: when files that the checkpoint lists are gone.
        """
        if state["where"] != self.where:
            raise ValueError(f"the checkpoint's run kept its q(v) in {state['where']!r}, this one in {self.where!r}")
        self._shared, self._own, self._is_tidy = dict(state["pairs"]), {}, True
        if self._files is not None:
            self._files.require(self._shared.values())
        self._checkpointed = dict(self._shared)

    def _read(self, entry: Any) -> dict[str, Tensor]:
        return self._files.read(entry) if self._files is not None else entry


class _Files:
    """Files whose names tell pair, generation and rank; within a generation a process writes its own files only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._generation: int | None = None

    @property
    def generation(self) -> int:
        """At first one more than any other in the folder, so that no file of an earlier run is written over."""
        if self._generation is None:
            claim_folder(self.folder)
            self._generation = 1 + max((number for _, number in self._present()), default=0)
        return self._generation

    def next_generation(self) -> None:
        self._generation = 1 + max(gather_objects(self.generation))

    def write(self, pair: Pair, state: Mapping[str, Tensor]) -> str:
        name = f"{_file_name(pair)}.g{self.generation}.r{rank()}.pt"
        save_checkpoint(self.folder / name, state)
        return name

    def read(self, name: str) -> dict[str, Tensor]:
        return load_checkpoint(self.folder / name)

    def require(self, names: Any) -> None:
        lost = sorted(name for name in names if not (self.folder / name).is_file())
        if lost:
            raise FileNotFoundError(
                f"{len(lost)} files of q(v) that the checkpoint lists are not in {self.folder}, such as {lost[0]}: "
                "a run can be resumed only from its last checkpoint, with the folder that belongs to it"
            )

    def remove_others(self, needed: set[str]) -> None:
        """Of earlier generations, which no process writes to any more."""
        old = [path for path, number in self._present() if number < self.generation and path.name not in needed]
        for path in old:
            path.unlink(missing_ok=True)
        logger.debug("%s: %d files of q(v) removed", self.folder, len(old))

    def _present(self) -> list[tuple[Path, int]]:
        matches = ((path, _FILE.fullmatch(path.name)) for path in self.folder.glob("*.pt"))
        return [(path, int(match[1])) for path, match in matches if match]


def _key(pair: Pair) -> str:
    return json.dumps([str(part) for part in pair])


def _file_name(pair: Pair) -> str:
    """Readable where the ids are plain; the hash tells apart what looks alike without its special characters."""
    readable = "_to_".join(re.sub(r"[^A-Za-z0-9-]+", "-", str(part))[:40] for part in pair)
    return f"{readable}.{hashlib.sha256(_key(pair).encode()).hexdigest()[:12]}"
