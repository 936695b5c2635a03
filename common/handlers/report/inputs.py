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
"""What a report is made of."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from common import __version__
from common.io import Scan

__all__ = ["ReportInputs", "library_versions"]

# A measure, or one for each label; None or NaN where it could not be measured.
Measure = float | None | Sequence[float | None]


@dataclass(frozen=True)
class ReportInputs:
    """One registered pair. Images, labels and maps are tensors or arrays, (*S) or with leading axes of size 1.

    Attributes:
        moving, fixed: the two files.
        before: (*S), the moving scan on the fixed file's grid before registration: where its header, or an affine map
            that came first, places it.
        moved: (*S), the same after registration.
        ddf: (1, d, *S) or (d, *S), as ``warp(moving.array, ddf)`` takes it: ``x + ddf(x)`` are voxels of the moving
            file's grid, x those of the fixed file's.
        fixed_label, before_label, moved_label: (*S) label maps on the fixed file's grid.
        fixed_points, before_points, moved_points: (N, d) landmarks in voxels of the fixed file's grid; ``before`` are
            those of the moving scan as ``before`` has it, ``moved`` where the registration brings them.
        aligned: whether an affine map came first; what is called before is then after that.
        maps: further maps (*S) on the fixed file's grid, by title, such as ``{"weight of the smoothness": ...}``.
        title: of the page.
        steps: what was done, such as ``{"affine": "rigid", "refinement": "50 iterations"}``.
        command: the command line.
        versions: of programs, and the device; see :func:`library_versions`.
        timings: seconds by stage.
        measures: as the evaluator names them, the value before registration with the suffix ``_before``.
        label_names: of the values of those measures that have one a label.
        warnings: that were raised.
    """

    moving: Scan
    fixed: Scan
    before: Any
    moved: Any
    ddf: Any
    fixed_label: Any = None
    before_label: Any = None
    moved_label: Any = None
    fixed_points: Any = None
    before_points: Any = None
    moved_points: Any = None
    aligned: bool = False
    maps: Mapping[str, Any] = field(default_factory=dict)
    title: str = "Registration report"
    steps: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    timings: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, Measure] = field(default_factory=dict)
    label_names: Sequence[str | int] = ()
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = self.fixed.array.shape
        dims = len(shape)
        if tuple(_shape(self.ddf)[-dims - 1 :]) != (dims, *shape):
            raise ValueError(f"ddf must be (1, {dims}, *{shape}) for {self.fixed.path}, got {tuple(_shape(self.ddf))}")
        named = {name: getattr(self, name) for name in ("before", "moved", *_LABELS)}
        for name, volume in {**named, **self.maps}.items():
            if volume is not None and not _lies_on(_shape(volume), shape):
                raise ValueError(f"{name} must be {shape}, as {self.fixed.path} is, got {tuple(_shape(volume))}")
        for name in ("fixed_points", "before_points", "moved_points"):
            points = getattr(self, name)
            if points is not None and (len(_shape(points)) != 2 or _shape(points)[1] != dims):
                raise ValueError(f"{name} must be (N, {dims}), got {tuple(_shape(points))}")


_LABELS = ("fixed_label", "before_label", "moved_label")


def library_versions(device: Any = None) -> dict[str, str]:
    """Of what ran: WarpZoo, torch, MONAI, Python, the system and, if told, the device."""
    found = {"WarpZoo": __version__, "torch": torch.__version__, "MONAI": _version("monai"), "NumPy": np.__version__}
    found |= {"Python": platform.python_version(), "system": platform.platform()}
    if device is not None:
        device = torch.device(device)
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in np.shape(value))


def _lies_on(have: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return have[-len(shape) :] == shape and all(n == 1 for n in have[: -len(shape)])
