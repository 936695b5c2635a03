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
"""The methods that :mod:`benchmarks.two_scans` compares: each a process from two files to files of transforms.

What a method has found is read back from the files that it left, as another program would.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.two_scans_pairs import Pair
from common.io import load_transform
from common.spatial import Affine, SpatialTransform

__all__ = ["METHODS", "REFINE", "Found", "Method", "available"]

REPOSITORY = Path(__file__).resolve().parent.parent
REFINE = 50
_STAGE = re.compile(r"Elapsed time \(stage \d+\): *([0-9.eE+-]+)")


class Found(NamedTuple):
    """A transform, of all or of the first part of what a method did.

    Attributes:
        method: its name in the table.
        transform: from the fixed to the moving file's world.
        search: seconds spent on finding it.
        command: seconds of the whole command, from files to files; None for a part of it.
    """

    method: str
    transform: SpatialTransform
    search: float | None = None
    command: float | None = None


class Method(NamedTuple):
    """What is run, and the packages that it needs."""

    run: Callable[[Pair, Path, int], list[Found]]
    needs: tuple[str, ...] = ()


def available(method: str) -> bool:
    """Whether the packages that a method needs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in METHODS[method].needs)


def as_they_lie(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """No registration at all: where the headers place the two scans."""
    return [Found("as the files lie", SpatialTransform((Affine(torch.eye(4, dtype=torch.float64)),)))]


def warpzoo(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """The command of the README; the affine map that it began with is a part of its own in the composite."""
    transform, seconds, command = _register(pair, folder, threads)
    linear = [part for part in transform.parts if isinstance(part, Affine)]
    start = SpatialTransform(tuple(linear or [Affine(torch.eye(4, dtype=torch.float64))]))
    return [
        Found("WarpZoo, affine", start, seconds["affine"]),
        Found("WarpZoo, affine and network", transform, seconds["affine"] + seconds["network"], command),
    ]


def refined(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """The same with instance optimisation."""
    transform, seconds, command = _register(pair, folder, threads, "--refine", str(REFINE))
    search = seconds["affine"] + seconds["network"] + seconds["refine"]
    return [Found(f"WarpZoo, affine, network, --refine {REFINE}", transform, search, command)]


def greedy(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """Greedy by its quick start, affine and then deformable."""
    affine_s, warp_s, command = _tool("greedy", pair, folder, threads)
    # Four lines of numbers would pass for a matrix of FLIRT, whose meaning is another.
    start = SpatialTransform((Affine(torch.from_numpy(np.loadtxt(folder / "affine.mat"))),))
    total = load_transform(folder / "warp.nii.gz").then(start)
    return [
        Found("Greedy, affine", start, affine_s),
        Found("Greedy, affine and deformable", total, affine_s + warp_s, command),
    ]


def syn(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """ANTsPy's SyN as it comes: an affine map and a field, both by mutual information."""
    start, total, affine_s, warp_s, command = _ants("syn", pair, folder, threads)
    return [Found("ANTs, affine", start, affine_s), Found("ANTs, SyN", total, affine_s + warp_s, command)]


def syn_cc(pair: Pair, folder: Path, threads: int) -> list[Found]:
    """ANTsPy's SyN after the same affine map, the field by local correlation."""
    _, total, affine_s, warp_s, command = _ants("syn_cc", pair, folder, threads)
    return [Found("ANTs, SyN by local correlation", total, affine_s + warp_s, command)]


METHODS = {
    "as_they_lie": Method(as_they_lie),
    "warpzoo": Method(warpzoo),
    "refined": Method(refined),
    "greedy": Method(greedy, ("picsl_greedy",)),
    "syn": Method(syn, ("ants",)),
    "syn_cc": Method(syn_cc, ("ants",)),
}


def _register(
    pair: Pair, folder: Path, threads: int, *options: str
) -> tuple[SpatialTransform, dict[str, float], float]:
    """``python -m common register``: the transform, its seconds by stage, and those of the command."""
    files: dict[str, Path | None] = {"moving": pair.moving, "fixed": pair.fixed}
    files |= {"moving_label": pair.moving_label, "fixed_label": pair.fixed_label} if pair.labels else {}
    arguments = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    command = ["common", "register", *arguments, "--output_dir", str(folder), *options]
    _, seconds = _timed(command, threads)
    timings = json.loads((folder / "metrics.json").read_text())["timings"]
    return load_transform(folder / "transform.h5"), timings, seconds


def _ants(
    kind: str, pair: Pair, folder: Path, threads: int
) -> tuple[SpatialTransform, SpatialTransform, float, float, float]:
    affine_s, warp_s, command = _tool(kind, pair, folder, threads)
    start = load_transform(folder / "0GenericAffine.mat")
    return start, load_transform(folder / "1Warp.nii.gz").then(start), affine_s, warp_s, command


def _tool(name: str, pair: Pair, folder: Path, threads: int) -> tuple[float, float, float]:
    """Run Greedy or ANTs: seconds of the affine stage, of the deformable one, and of the command.

    Raises:
        RuntimeError: when it fails, or does not say how long its two stages took.
    """
    arguments = [name, str(pair.moving), str(pair.fixed), str(folder), str(threads)]
    said, seconds = _timed(["benchmarks.two_scans_tools", *arguments], threads)
    stages = [float(number) for number in _STAGE.findall(said)]
    if len(stages) != 2:
        raise RuntimeError(f"{name}: expected the times of two stages, found {stages} in\n{said[-2000:]}")
    return stages[0], stages[1], seconds


def _timed(module: Sequence[str], threads: int) -> tuple[str, float]:
    """Run ``python -m`` with so many threads, without a GPU: what it printed, and its seconds.

    Raises:
        RuntimeError: when it fails; holds the end of what it said.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", *module], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if result.returncode:
        raise RuntimeError(f"{' '.join(module)} failed:\n{(result.stdout + result.stderr)[-2000:]}")
    return result.stdout, seconds
