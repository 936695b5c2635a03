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
"""Every field of an evaluation in the files that Learn2Reg's organisers take."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events

from common.handlers.output import claim_folder
from common.io import load_image, save_field
from common.spatial.world import field_on_grid

__all__ = ["Learn2RegWriter", "case_number", "field_name"]

logger = logging.getLogger(__name__)


class Learn2RegWriter:
    """Write ``disp_FFFF_MMMM.nii.gz`` for each pair of an evaluator: the fixed image's number first.

    The network saw reoriented, padded or cropped images; the field written is on the grid of the fixed image's *file*,
    in voxels of the moving image's file, (H,W,D,3) float32, full resolution: ``moved(i) = moving(i + disp(i))``.
    Learn2Reg's and LUMIR's evaluations take it as it is.

    Args:
        output_dir: folder, made and tried before the first pair.
        pairs: those of the evaluator, with the files ``moving`` and ``fixed`` and their ids.

    Raises:
        ValueError: when two pairs would get one name.
        OSError: when the evaluator starts, for a folder that cannot be written to.
    """

    def __init__(self, output_dir: str | Path, pairs: Sequence[Mapping[str, Any]]) -> None:
        self.output_dir = Path(output_dir)
        self.pairs = {(str(pair["moving_id"]), str(pair["fixed_id"])): pair for pair in pairs}
        self.names = {ids: field_name(moving_id=ids[0], fixed_id=ids[1]) for ids in self.pairs}
        taken: dict[str, tuple[str, str]] = {}
        for ids, name in self.names.items():
            if name in taken:
                raise ValueError(f"the pairs {taken[name]} and {ids} (moving, fixed) would both be written to {name}")
            taken[name] = ids

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.STARTED, lambda: claim_folder(self.output_dir))
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write_batch)
        engine.add_event_handler(Events.COMPLETED, lambda: logger.info("fields are in %s", self.output_dir))

    def _write_batch(self, engine: Engine) -> None:
        output = engine.state.output
        for item, ids in enumerate(zip(output["moving_id"], output["fixed_id"], strict=True)):
            fixed, moving = (load_image(self.pairs[ids][role]) for role in ("fixed", "moving"))
            grids = output["fixed_affine"][item], output["moving_affine"][item]
            affines = torch.from_numpy(fixed.affine), torch.from_numpy(moving.affine)
            ddf = field_on_grid(output["ddf"][item : item + 1], *grids, fixed.array.shape, *affines)
            save_field(self.output_dir / self.names[ids], ddf, fixed.affine_3d, moving.affine_3d, fmt="l2r")


def field_name(*, moving_id: str, fixed_id: str) -> str:
    """The file of a pair's field, such as ``disp_0237_0029.nii.gz`` for fixed 0237 and moving 0029."""
    return f"disp_{case_number(fixed_id)}_{case_number(moving_id)}.nii.gz"


def case_number(name: str) -> str:
    """The number of an image in Learn2Reg's file names: the longest run of digits, the first of several, as 4 digits.

    Args:
        name: an id, such as ``OASIS_0029_0000`` (Learn2Reg's own, where ``_0000`` is the modality) or
            ``hippocampus_123``.

    Returns:
        ``0029``, ``0123``; longer numbers stay whole.

    Raises:
        ValueError: when there is no digit.
    """
    runs = re.findall(r"\d+", re.sub(r"(?<=\d)_000\d$", "", name))
    if not runs:
        raise ValueError(f"the id '{name}' has no number, which names Learn2Reg's files: expected one like OASIS_0029")
    return str(max(runs, key=len)).zfill(4)
