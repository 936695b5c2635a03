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
"""What :class:`common.handlers.RegistrationWriter` knows of a pair, as the report wants it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.handlers.registered import RegisteredPair
from common.handlers.report import ReportInputs, write_report
from common.handlers.report.inputs import library_versions
from common.handlers.summary import steps_of
from common.io import load_pair_points
from common.io.pair_folders import named_columns
from common.io.points import from_ras
from common.spatial import Affine, SpatialTransform

__all__ = ["report_points", "write_pair_report"]

_ROLES = ("moving", "fixed")


def write_pair_report(
    folder: Path,
    found: RegisteredPair,
    seen: Mapping[str, Any],
    maps: Mapping[str, Any],
    *,
    measures: Mapping[str, Sequence[float]],
    columns: Mapping[str, Sequence[str]],
    timings: Mapping[str, float],
    bundle: str | None = None,
) -> None:
    """Write ``report.html``.

    Args:
        folder: where to.
        found: the pair.
        seen: images, label maps and landmarks on the fixed file's grid, as :class:`common.handlers.report.ReportInputs`
            calls them.
        maps: further maps by name; what is no tensor is left out.
        measures: values by name.
        columns: what the values of each measure are called.
        timings: seconds by stage.
        bundle: name and version of the network's bundle.
    """
    inputs = ReportInputs(
        moving=found.moving,
        fixed=found.fixed,
        ddf=found.ddf,
        aligned=found.affine_part is not None,
        maps={name.replace("_", " "): each for name, each in maps.items() if isinstance(each, Tensor)},
        title="Registration report" if bundle is None else f"Registration by {bundle}",
        steps=steps_of(found, bundle),
        # What the user typed, whatever ran in its place since.
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        versions=library_versions(found.device),
        timings=timings,
        measures=measures,
        label_names=_label_names(measures, columns),
        warnings=_warnings(found),
        **seen,
    )
    write_report(folder / "report.html", inputs)


def report_points(found: RegisteredPair, back: SpatialTransform | None) -> dict[str, Tensor]:
    """The landmarks of a pair that has them, (N, d) in voxels of the fixed file.

    Args:
        found: the pair, with ``moving_points`` and ``fixed_points`` in ``points_space``.
        back: from the moving to the fixed scan, if there is such a transform.

    Returns:
        ``fixed_points``; ``before_points``, those of the moving scan where it lay when the network met it; and, with
        ``back``, ``moved_points``.
    """
    files = {role: found.pair[f"{role}_points"] for role in _ROLES if found.pair.get(f"{role}_points")}
    if not files:
        return {}
    scans = {"moving": found.moving, "fixed": found.fixed}
    points, _ = load_pair_points(files, scans, found.pair.get("points_space") or "ras")
    before = Affine(torch.linalg.inv(found.matrix)).points(points["moving"])
    placed = {"fixed_points": points["fixed"], "before_points": before}
    placed |= {} if back is None else {"moved_points": back.points(points["moving"])}
    return {name: from_ras(each, "voxel", found.fixed_grid) for name, each in placed.items()}


def _label_names(measures: Mapping[str, Sequence[float]], columns: Mapping[str, Sequence[str]]) -> Sequence[str]:
    named = named_columns(measures, columns).items()
    return next((names for name, names in named if len(names) == len(measures[name])), ())


def _warnings(found: RegisteredPair) -> list[str]:
    """What was noted when the pair was loaded, a line each."""
    notes = found.output.get("warnings") or ""
    return [line for line in (notes if isinstance(notes, str) else notes[found.item]).splitlines() if line]
