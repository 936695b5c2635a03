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
"""The pairs of files that :mod:`benchmarks.two_scans` registers, and what is measured on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

from common.data import load_cohort
from common.io import Scan, grid_of, load_image, load_label_map
from common.losses import LNCC
from common.metrics import DiceScore, NonPositiveJacobianPercent
from common.spatial import SpatialTransform, warp_labels, warp_scan

__all__ = ["WHAT", "Pair", "PairMeasures", "list_pairs"]

WHAT = ("hippocampus", "brain")
_WINDOW = 9


@dataclass(frozen=True)
class Pair:
    """Two files, and their label maps where there are any."""

    what: str
    name: str
    moving: Path
    fixed: Path
    moving_label: Path | None = None
    fixed_label: Path | None = None
    labels: tuple[int, ...] = ()


def list_pairs(what: str, data: Path, count: int) -> list[Pair]:
    """The pairs of one kind.

    Args:
        what: "hippocampus" (the first test pairs of ``data_splits/hippocampus.json``, whose crops differ in size and
            place) or "brain" (one pair, 160 x 192 x 224, without label maps).
        data: the folder with ``Task04_Hippocampus`` and ``brain_pair``.
        count: of the hippocampus pairs.

    Raises:
        FileNotFoundError: when the data are not there.
        ValueError: for an unknown kind.
    """
    if what not in WHAT:
        raise ValueError(f"what must be one of {WHAT}, got {what!r}")
    if what == "brain":
        moving, fixed = (data / "brain_pair" / f"image_{letter}_full_size.nii.gz" for letter in "AB")
        for path in (moving, fixed):
            if not path.is_file():
                raise FileNotFoundError(f"no brain pair: {path} is missing")
        return [Pair(what, "image_A_to_image_B", moving, fixed)]
    cohort = load_cohort("hippocampus", data / "Task04_Hippocampus")
    keys = ("moving", "fixed", "moving_label", "fixed_label")
    return [
        Pair(
            what,
            f"{entry['moving_id']}_to_{entry['fixed_id']}",
            **{key: Path(entry[key]) for key in keys},
            labels=tuple(cohort.foreground_labels),
        )
        for entry in cohort.test[:count]
    ]


class PairMeasures:
    """The same measures for whoever found the transform, all on the grid of the fixed file.

    Images are moved linearly with 0 outside, label maps by the label with the greatest linearly interpolated share.

    Args:
        pair: whose files are read, once.
    """

    def __init__(self, pair: Pair) -> None:
        scans = [load_image(path) for path in (pair.moving, pair.fixed)]
        self.moving_grid, self.fixed_grid = (grid_of(scan) for scan in scans)
        self.moving, self.fixed = (_tensor(scan, "float32") for scan in scans)
        maps = [load_label_map(path) for path in (pair.moving_label, pair.fixed_label) if path is not None]
        self.maps = [_tensor(scan, "int32") for scan in maps]
        self.labels: Sequence[int] = pair.labels
        self.scales = [float(image.std()) for image in (self.moving, self.fixed)]
        # The skull-stripped brain and a rim of half a window, so that a moved brain that is too large counts too.
        self.where = max_pool3d((self.fixed > 0).float(), _WINDOW, 1, _WINDOW // 2)

    def __call__(self, transform: SpatialTransform) -> dict[str, float]:
        """Measure a transform.

        Args:
            transform: from the fixed to the moving file's world, RAS mm.

        Returns:
            ``dice``, the mean over the labels, where there are label maps; ``lncc``, the mean squared local correlation
            in windows of 9 voxels where the fixed image is above 0 and near it, 1 at best, of images of standard
            deviation 1; ``folds``, the percentage of voxels at which the transform folds.
        """
        ddf = transform.ddf(self.fixed_grid, self.moving_grid)
        measured: dict[str, float] = {}
        if len(self.maps) == 2:
            moving, fixed = self.maps
            moved = warp_labels(moving, ddf, padding="zeros")
            measured["dice"] = float(DiceScore(self.labels)(moved, fixed, moving).nanmean())
        images = (warp_scan(self.moving, ddf), self.fixed)
        scaled = [image / scale for image, scale in zip(images, self.scales, strict=True)]
        measured["lncc"] = -float(LNCC(_WINDOW)(*scaled, self.where))
        del ddf, images, scaled
        # In voxels of the fixed grid on both sides, so that a grid which is stored mirrored is no fold.
        own = transform.ddf(self.fixed_grid, self.fixed_grid)
        measured["folds"] = float(NonPositiveJacobianPercent()(own))
        return measured


def _tensor(scan: Scan, dtype: str) -> Tensor:
    """(1, 1, *S)."""
    return torch.from_numpy(scan.array.astype(dtype))[None, None]
