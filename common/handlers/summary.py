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
"""What became of one pair, in a few lines: what was done, how long it took, and which files there are now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from common.handlers.registered import RegisteredPair

__all__ = ["clear_results", "files_in_words", "require_other_folder", "steps_of", "times_in_words", "timings_of"]

_FILES = {
    "report.html": "open this in a browser: pictures, measures, what was done",
    "moved.nii.gz": "the moving scan on the fixed scan's grid",
    "moved_label.nii.gz": "its label map, likewise",
    "transform.h5": "the transform for ITK, ANTs and Slicer, affine map and field apart",
    "ddf.nii.gz": "the same as one displacement field",
    "ddf_l2r.nii.gz": "the same as Learn2Reg has it",
    "inverse_moved.nii.gz": "the fixed scan on the moving scan's grid",
    "inverse_transform.h5": "the transform back",
    "inverse_ddf.nii.gz": "the same as one displacement field",
    "inverse_ddf_l2r.nii.gz": "the same as Learn2Reg has it",
    "jacobian.nii.gz": "change of volume at each voxel, 0 or less where the field folds",
    "weight_map.nii.gz": "weight of the smoothness at each voxel",
    "uncertainty.nii.gz": "standard deviation in mm of where each voxel comes from",
    "mean_ddf.nii.gz": "mean of the samples of the field",
    "std_ddf.nii.gz": "their standard deviation along each axis",
    "label_uncertainty.nii.gz": "how far the samples disagree about the label",
    "registration.png": "before and after in one picture",
    "metrics.json": "measures and seconds",
}


_INPUTS = tuple(f"{role}{kind}" for role in ("moving", "fixed") for kind in ("", "_label", "_points"))


def require_other_folder(folder: Path, pair: Mapping[str, Any]) -> None:
    """Whether results can go to a folder without replacing what they come from.

    Raises:
        ValueError: for a file of the pair that lies there and is called as a result is; names it.
    """
    for path in (Path(pair[key]) for key in _INPUTS if pair.get(key)):
        if path.name in _FILES and path.resolve().parent == folder.resolve():
            raise ValueError(f"{path} would be replaced by a result of the same name: choose another --output_dir")


def clear_results(folder: Path) -> None:
    """Remove the results of an earlier run, of which the next may leave some: the way back of another way there."""
    transforms = [name for name in _FILES if "ddf" in name or "transform" in name]
    for name in (*_FILES, *(f"{name.removesuffix('.nii.gz').removesuffix('.h5')}.json" for name in transforms)):
        (folder / name).unlink(missing_ok=True)


def steps_of(found: RegisteredPair, bundle: str | None = None) -> dict[str, str]:
    """What was done, step by step: ``affine``, ``network`` and ``refinement``, as far as each is known."""
    output, steps = found.output, {}
    alignment = output.get("alignment")
    if alignment is not None:
        steps["affine"] = alignment if isinstance(alignment, str) else alignment[found.item]
    if bundle is not None:
        steps["network"] = bundle
    numbers = output.get("refinement")
    if numbers:
        course = ""
        if "loss_before" in numbers and "loss_after" in numbers:
            course = f", loss {numbers['loss_before']:.4g} before, {numbers['loss_after']:.4g} after"
        steps["refinement"] = f"{numbers['iterations']:.0f} iterations{course}"
    return steps


def timings_of(found: RegisteredPair) -> dict[str, float]:
    """Seconds of the stages before writing, of this pair: numbers, or one for each pair of the batch."""
    stages: Mapping[str, Any] = found.output.get("timings") or {}
    rows = {name: torch.as_tensor(value).reshape(-1) for name, value in stages.items()}
    return {name: float(row[found.item] if len(row) > 1 else row[0]) for name, row in rows.items()}


def times_in_words(timings: Mapping[str, float]) -> str:
    """Such as ``load 0.4 s, network 2.1 s``."""
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in timings.items())


def files_in_words(folder: Path, names: Iterable[str]) -> str:
    """A line for each file that is known, the one to look at first at the top; JSON files go with their transforms."""
    there = set(names)
    listed = {name: phrase for name, phrase in _FILES.items() if name in there}
    width = max(map(len, listed), default=0)
    return "\n".join([f"results in {folder}:", *(f"  {name:<{width}}  {phrase}" for name, phrase in listed.items())])
