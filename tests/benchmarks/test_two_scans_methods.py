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
"""What is run, and that what other tools leave is read as they mean it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.two_scans_methods import METHODS, REFINE, Found, available
from benchmarks.two_scans_pairs import Pair
from common.io import Scan, grid_of, load_image, save_field, save_image, save_transform
from common.register import command as monai_command
from common.spatial import Affine, Displacement, SpatialTransform, warp_scan

POINT = torch.tensor([[10.0, 11.0, 12.0]], dtype=torch.float64)
TIMES = "Elapsed time (stage 0): 1.5e+00\nmore\n  Elapsed time (stage 1): 0.25\n"


def texture(size: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth blobs on nothing, in [0, 100]."""
    noise = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool3d(noise, 5, 1, 2)
    smooth = torch.nn.functional.avg_pool3d(smooth, 5, 1, 2)[0, 0].numpy()
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
    envelope = np.exp(-2 * sum(axis**2 for axis in axes))
    return (100 * envelope * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """Two different scans on grids that are oblique, anisotropic and not the same; the moving one mirrored too."""
    angle = np.deg2rad(12)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    fixed = turn @ np.diag([1.0, 1.25, 1.5, 1.0])
    moving = np.diag([-1.2, 1.0, 1.3, 1.0])
    moving[:3, 3] = (30.0, 2.0, -1.0)
    for name, size, affine in (("fixed", (36, 33, 32), fixed), ("moving", (34, 38, 35), moving)):
        save_image(tmp_path / f"{name}.nii.gz", texture(size, 5), affine)
    return Pair("hippocampus", "a_to_b", tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every process that would be started; instead it leaves a shift by 1 mm along x, and a doubling."""
    started: list[dict[str, Any]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append({"command": command[1:], "env": env})
        folder = Path(command[command.index("--output_dir") + 1] if "--output_dir" in command else command[-2])
        scan = Scan(np.zeros((40, 40, 40), np.float32), np.eye(4), folder / "x", np.eye(4))
        ddf = torch.zeros(1, 3, 40, 40, 40)
        ddf[:, 0] = 1.0
        shift = Displacement(ddf[0], grid_of(scan))
        double = Affine(torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)))
        for name in ("warp.nii.gz", "1Warp.nii.gz"):
            save_field(folder / name, ddf, np.eye(4))
        np.savetxt(folder / "affine.mat", double.matrix.numpy())
        save_transform(folder / "0GenericAffine.mat", SpatialTransform((double,)), scan, scan)
        save_transform(folder / "transform.h5", SpatialTransform((shift, double)), scan, scan)
        timings = {"load": 9.0, "affine": 1.0, "network": 2.0, "refine": 4.0, "write": 9.0}
        (folder / "metrics.json").write_text(json.dumps({"timings": timings}))
        return subprocess.CompletedProcess(command, 0, TIMES, "")

    monkeypatch.setattr(subprocess, "run", run)
    return started


def moved(found: Found) -> list[float]:
    return found.transform.points(POINT)[0].tolist()


ALIGNED, WHOLE = [20.0, 22.0, 24.0], [22.0, 22.0, 24.0]


@pytest.mark.parametrize("method", ["greedy", "syn", "syn_cc"])
def test_the_field_acts_on_a_fixed_point_before_the_affine_map(
    method: str, pair: Pair, ran: list[dict[str, Any]], tmp_path: Path
) -> None:
    *start, whole = METHODS[method].run(pair, tmp_path, 3)
    assert moved(whole) == pytest.approx(WHOLE, abs=1e-4) and whole.search == 1.75 and whole.command is not None
    assert [(moved(found), found.search, found.command) for found in start] == [(ALIGNED, 1.5, None)] * len(start)
    (process,) = ran
    files = [str(pair.moving), str(pair.fixed), str(tmp_path)]
    assert process["command"] == ["-m", "benchmarks.two_scans_tools", method, *files, "3"]
    assert process["env"]["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] == "3" == process["env"]["OMP_NUM_THREADS"]


def test_the_command_of_the_readme_is_what_is_run(pair: Pair, ran: list[dict[str, Any]], tmp_path: Path) -> None:
    start, whole = METHODS["warpzoo"].run(pair, tmp_path, 2)
    assert moved(start) == ALIGNED and (start.search, start.command) == (1.0, None)
    assert moved(whole) == pytest.approx(WHOLE, abs=1e-4) and whole.search == 3.0
    (refined,) = METHODS["refined"].run(pair, tmp_path, 2)
    assert refined.search == 7.0 and f"--refine {REFINE}" in refined.method
    plain, further = (process["command"] for process in ran)
    files = ["--moving", str(pair.moving), "--fixed", str(pair.fixed), "--output_dir", str(tmp_path)]
    assert plain == ["-m", "common", "register", *files]
    assert further == [*plain, "--refine", str(REFINE)]


def test_its_options_are_keys_of_the_config(pair: Pair, ran: list[dict[str, Any]], tmp_path: Path) -> None:
    from common.options import check_options

    labelled = Pair("hippocampus", "a", pair.moving, pair.fixed, pair.moving, pair.fixed, (1,))
    METHODS["refined"].run(labelled, tmp_path, 1)
    typed = ran[0]["command"][3:]
    options = dict(zip([name.removeprefix("--") for name in typed[::2]], typed[1::2], strict=True))
    assert {"moving_label", "fixed_label", "refine"} <= set(options)
    check_options(["/site-packages/monai/bundle/__main__.py", *monai_command(**options)])


def test_without_an_affine_part_the_start_is_as_the_files_lie(
    pair: Pair, ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import two_scans_methods

    shift = Displacement(torch.ones(3, 4, 4, 4), grid_of(Scan(np.zeros((4, 4, 4)), np.eye(4), tmp_path, np.eye(4))))
    monkeypatch.setattr(two_scans_methods, "load_transform", lambda path: SpatialTransform((shift,)))
    start, _ = METHODS["warpzoo"].run(pair, tmp_path, 1)
    assert moved(start) == POINT[0].tolist() == moved(METHODS["as_they_lie"].run(pair, tmp_path, 1)[0])


def test_what_a_tool_does_not_say_is_an_error(
    pair: Pair, ran: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = subprocess.CompletedProcess([], 0, "Elapsed time (stage 0): 1\nand no more", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: silent)
    with pytest.raises(RuntimeError, match=r"expected the times of two stages, found \[1.0\][\s\S]*and no more"):
        METHODS["syn"].run(pair, tmp_path, 1)
    failed = subprocess.CompletedProcess([], 1, "", "no such file")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"common register [\s\S]*no such file"):
        METHODS["warpzoo"].run(pair, tmp_path, 1)


@pytest.mark.parametrize("method", ["greedy", "syn"])
def test_a_tool_moves_the_scan_where_its_transform_says(method: str, pair: Pair, tmp_path: Path) -> None:
    """The tool's own moved image is that which its files give here, on oblique and mirrored grids."""
    if not available(method):
        pytest.skip(f"{METHODS[method].needs} is not installed")
    _, whole = METHODS[method].run(pair, tmp_path, 1)
    scans = [load_image(path) for path in (pair.moving, pair.fixed)]
    ddf = whole.transform.ddf(grid_of(scans[1]), grid_of(scans[0]))
    ours = warp_scan(torch.from_numpy(scans[0].array)[None, None], ddf)[0, 0].numpy()
    theirs = load_image(tmp_path / "moved.nii.gz").array
    assert whole.search is not None and whole.command is not None and whole.search < whole.command
    # The scan fades out towards its edge, where tools differ in what they take to lie beyond it.
    assert np.abs(ours - theirs).max() < 0.5 and np.abs(ours - theirs).mean() < 0.01
    still = warp_scan(torch.from_numpy(scans[0].array)[None, None], _nothing().ddf(*map(grid_of, scans[::-1])))
    assert np.abs(still[0, 0].numpy() - theirs).max() > 20


def _nothing() -> SpatialTransform:
    return SpatialTransform((Affine(torch.eye(4, dtype=torch.float64)),))
