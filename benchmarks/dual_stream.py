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
"""The six variants of the dual-stream pyramid against their published implementation, and full-size pairs.

The published code's figures are not measured here but quoted: one thread at 48^3 and 64^3 (CPU-seconds, peak of the
whole process), two cores for a full-size brain pair. Peaks hold the imports: ``base_mb`` says how much that is for
ours; theirs was about 265 MB.

``python -m benchmarks --only dual_stream`` or ``python -m benchmarks.dual_stream``. Full-size runs take the brain pair
of the folder that WARPZOO_SHARED names (or ``shared`` beside the checkout), or else random images.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import format_table, peak_of_process_mb

__all__ = ["build_pass", "measure"]

# CPU-seconds forward and training step at 48^3; peak of the process in MB forward and training step at 64^3.
PUBLISHED = {
    "conv_mf": ((0.62, 2.60), (553, 1489)),
    "conv_mfc": ((0.76, 3.22), (664, 1785)),
    "conv_c": ((0.72, 3.06), (559, 1685)),
    "convic_mf": ((1.90, 6.87), (756, 2355)),
    "convic_c": ((2.20, 7.26), (918, 2624)),
    "vfa": ((0.94, 3.54), (923, 2122)),
}
# Wall seconds on two cores and peak in MB of one full-size pair, forward.
FULL_SIZE = (160, 192, 224)
PUBLISHED_FULL = {"conv_c": (39.0, 5500), "vfa": (64.0, 16300), "convic_c": (120.0, 11900), "greedy": (81.0, 1300)}
_MODES = ("forward", "train step")
_SHARED = Path(os.environ.get("WARPZOO_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))


def measure(repeats: int = 3, *, full_size: bool = True) -> list[dict[str, Any]]:
    """Measure each row in a fresh process.

    Args:
        repeats: passes at 48^3, the fastest of which counts; at 64^3 and in full size there is one.
        full_size: measure these too; minutes.

    Returns:
        rows of ``what``, ``mode``, ``size``, ``threads``, ``cpu_s``, ``wall_s``, ``peak_mb``, ``base_mb`` (of the
        process before), ``published_s`` (CPU-seconds on one thread, wall otherwise), ``published_mb``, and the ratios
        published over ours; NaN where nothing was published. Greedy's row is measured if picsl_greedy is installed;
        otherwise its figures are the published ones.
    """
    rows = []
    for variant, (seconds, megabytes) in PUBLISHED.items():
        for mode, cpu_s, peak_mb in zip(_MODES, seconds, megabytes, strict=True):
            rows.append(_row(variant, mode, (48,) * 3, 1, repeats, cpu_s, None))
            rows.append(_row(variant, mode, (64,) * 3, 1, 1, None, peak_mb))
    if full_size:
        for variant, (wall_s, peak_mb) in PUBLISHED_FULL.items():
            rows.append(_row(variant, "forward", FULL_SIZE, os.cpu_count() or 1, 1, wall_s, peak_mb))
    return rows


def build_pass(variant: str, mode: str, size: Sequence[int]) -> Callable[[], object]:
    """A forward pass or a training step on one pair.

    Args:
        variant: a decoder of the dual-stream pyramid, or "greedy".
        mode: "forward" or "train step".
        size: of the images.
    """
    from bundles.dual_stream_pyramid.scripts.pyramid import DualStreamPyramid
    from common.networks import FlowHead

    image = _pair(size)
    if variant == "greedy":
        from bundles.dual_stream_pyramid.scripts.greedy import Greedy

        return lambda: Greedy(3)(image)
    torch.manual_seed(0)
    network = DualStreamPyramid(3, variant)
    for module in network.modules():
        if isinstance(module, FlowHead):  # heads that say nothing would leave the inversion nothing to do
            torch.nn.init.normal_(module.conv.weight, std=4e-3)
    if mode == "forward":
        return torch.no_grad()(lambda: network(image))
    return _training_step(network, image)


def _training_step(network: torch.nn.Module, image: Tensor) -> Callable[[], object]:
    """LNCC and diffusion, in both directions if there are two, and a step of Adam."""
    from common.losses import LNCC, Diffusion
    from common.spatial import warp

    similarity, smoothness = LNCC(9), Diffusion()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, amsgrad=True)

    def step() -> object:
        optimizer.zero_grad()
        moving, fixed = image.chunk(2, dim=1)
        found = network.fields(image)
        loss = similarity(warp(moving, found["ddf"]), fixed) + smoothness(found["ddf"])
        if "inverse_ddf" in found:
            inverse = found["inverse_ddf"]
            loss = (loss + similarity(warp(fixed, inverse), moving) + smoothness(inverse)) / 2
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _pair(size: Sequence[int]) -> Tensor:
    """The brain pair if it is there and of this size, else random images: (1, 2, *size) in [0, 1]."""
    paths = sorted((_SHARED / "data/brain_pair").glob("image_?_full_size.nii.gz"))
    if tuple(size) == FULL_SIZE and len(paths) == 2:
        import nibabel

        scans = [torch.from_numpy(nibabel.load(path).get_fdata(dtype="float32")) for path in paths]  # type: ignore
        if all(tuple(scan.shape) == FULL_SIZE for scan in scans):
            return torch.stack([scan / scan.max() for scan in scans])[None]
    return torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))


def _row(
    what: str,
    mode: str,
    size: Sequence[int],
    threads: int,
    repeats: int,
    published_s: float | None,
    published_mb: float | None,
) -> dict[str, Any]:
    unknown = float("nan")
    time_there = unknown if published_s is None else published_s
    peak_there = unknown if published_mb is None else float(published_mb)
    if what == "greedy" and importlib.util.find_spec("picsl_greedy") is None:
        cpu_s, wall_s, peak_mb, base_mb = unknown, time_there, peak_there, unknown
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cpu_s, wall_s, peak_mb, base_mb = pool.apply(_cost, (what, mode, tuple(size), threads, repeats))
    return {
        "what": what,
        "mode": mode,
        "size": "x".join(str(n) for n in size),
        "threads": threads,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "peak_mb": peak_mb,
        "base_mb": base_mb,
        "published_s": time_there,
        "published_mb": peak_there,
        "ratio_time": time_there / (cpu_s if threads == 1 else wall_s),
        "ratio_memory": peak_there / peak_mb,
    }


def _cost(what: str, mode: str, size: Sequence[int], threads: int, repeats: int) -> tuple[float, float, float, float]:
    """Least CPU- and wall-seconds of a pass, and this process's peak and what was resident before, in mebibytes."""
    torch.set_num_threads(threads)
    call = build_pass(what, mode, size)
    base_mb = peak_of_process_mb()
    cpu_s = wall_s = float("inf")
    for _ in range(repeats):
        start, wall_start = time.process_time(), time.perf_counter()
        call()
        cpu_s = min(cpu_s, time.process_time() - start)
        wall_s = min(wall_s, time.perf_counter() - wall_start)
    return cpu_s, wall_s, peak_of_process_mb(), base_mb


if __name__ == "__main__":
    sys.stdout.write(format_table(measure()) + "\n")
