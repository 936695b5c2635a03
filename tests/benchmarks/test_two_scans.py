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
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import two_scans
from benchmarks.two_scans_methods import METHODS, Found, Method
from benchmarks.two_scans_pairs import Pair, PairMeasures, list_pairs
from common.io import save_image
from common.spatial import Affine, SpatialTransform

SIZE = (14, 15, 16)


def shifted(*mm: float) -> SpatialTransform:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = torch.tensor(mm, dtype=torch.float64)
    return SpatialTransform((Affine(matrix),))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """An image and the same image two voxels on, on a grid that is stored mirrored; a box of 4 voxels as label."""
    affine = np.diag([-2.0, 1.0, 1.0, 1.0])
    texture = np.random.default_rng(0).random(SIZE).astype(np.float32)
    box = np.zeros(SIZE, np.uint8)
    box[5:9, 4:10, 4:10] = 3
    for name, array in {"fixed": texture, "fixed_label": box}.items():
        save_image(tmp_path / f"{name}.nii.gz", array, affine)
        save_image(tmp_path / f"{name.replace('fixed', 'moving')}.nii.gz", np.roll(array, 2, axis=0), affine)
    files = {role: tmp_path / f"{role}.nii.gz" for role in ("moving", "fixed", "moving_label", "fixed_label")}
    return Pair("hippocampus", "a_to_b", **files, labels=(3,))


def test_measures_are_those_of_the_fixed_files_grid(pair: Pair) -> None:
    measures = PairMeasures(pair)
    still = measures(shifted(0, 0, 0))
    # Two of the four layers overlap.
    assert still["dice"] == pytest.approx(0.5) and still["lncc"] < 0.4 and still["folds"] == 0
    # Two voxels along an axis that runs to the left, 2 mm each.
    undone = measures(shifted(-4, 0, 0))
    assert undone["dice"] == 1 and undone["lncc"] > 0.8 and undone["folds"] == 0
    half = measures(shifted(-2, 0, 0))
    assert half["dice"] == pytest.approx(0.75)


def test_a_map_that_mirrors_is_folded_everywhere(pair: Pair) -> None:
    mirror = SpatialTransform((Affine(torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))),))
    assert PairMeasures(pair)(mirror)["folds"] == 100


def test_correlation_is_of_what_the_fixed_image_shows_whatever_its_units(tmp_path: Path) -> None:
    """A wide empty margin and another intensity scale change nothing; what spills over the edge counts."""
    inside = np.random.default_rng(0).random((12, 12, 12)).astype(np.float32)

    def correlation(moving: np.ndarray, scale: float, margin: int) -> float:
        for name, array in (("moving", moving * scale), ("fixed", np.pad(inside + 0.1, 6))):
            save_image(tmp_path / f"{name}.nii.gz", np.pad(array, margin), np.eye(4))
        pair = Pair("brain", "x", tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz")
        return PairMeasures(pair)(shifted(0, 0, 0))["lncc"]

    near = np.pad(inside + 0.1, 6)
    expected = correlation(near, 1.0, 0)
    assert expected > 0.99
    assert correlation(near, 1e-4, 10) == pytest.approx(expected, abs=1e-3)
    spilled = np.where(near == 0, np.random.default_rng(1).random(near.shape).astype(np.float32), near)
    assert correlation(spilled, 1.0, 0) < 0.8 * expected


def test_without_label_maps_there_is_no_dice(pair: Pair) -> None:
    assert set(PairMeasures(Pair("brain", "x", pair.moving, pair.fixed))(shifted(0, 0, 0))) == {"lncc", "folds"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Instead of all methods: one that finds, one that fails until it is mended, one that is not installed."""
    made: list[tuple[str, str, int]] = []

    def good(pair: Pair, folder: Path, threads: int) -> list[Found]:
        made.append(("good", pair.name, threads))
        (folder / "left").write_text("something")
        return [Found("good, half", shifted(-2, 0, 0), 1.0), Found("good", shifted(-4, 0, 0), 3.0, 5.0)]

    def bad(pair: Pair, folder: Path, threads: int) -> list[Found]:
        made.append(("bad", pair.name, threads))
        raise RuntimeError("no memory")

    for name in list(METHODS):
        monkeypatch.delitem(METHODS, name)
    monkeypatch.setitem(METHODS, "good", Method(good))
    monkeypatch.setitem(METHODS, "bad", Method(bad))
    monkeypatch.setitem(METHODS, "absent", Method(bad, ("no_such_package",)))
    return made


def test_rows_are_measured_once(pair: Pair, calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, names = tmp_path / "runs" / "out.json", ("good", "bad", "absent")
    first = two_scans.measure([pair], output, names, 1, keep=tmp_path / "kept")
    assert calls == [("good", "a_to_b", 1), ("bad", "a_to_b", 1)]
    assert "absent is left out: no_such_package is not installed" in capsys.readouterr().out
    half, whole = first["rows"]
    assert half["method"] == "good, half" and half["search_s"] == 1 and "command_s" not in half
    assert whole["dice"] == 1 and whole["command_s"] == 5 and whole["run"] == "good" and whole["pair"] == "a_to_b"
    assert first["errors"] == [{"pair": "a_to_b", "run": "bad", "error": "no memory"}]
    assert (tmp_path / "kept" / "a_to_b" / "good" / "left").is_file()

    # What failed is tried again; another pair is added; nothing else is done twice.
    other = Pair("brain", "c_to_d", pair.moving, pair.fixed)
    second = two_scans.measure([pair, other], output, names, 1)
    assert calls[2:] == [("bad", "a_to_b", 1), ("good", "c_to_d", 1), ("bad", "c_to_d", 1)]
    assert second["rows"][:2] == first["rows"] and len(second["rows"]) == 4 and len(second["errors"]) == 2
    assert json.loads(output.read_text()) == second and second["seconds"] > first["seconds"]
    with pytest.raises(ValueError, match="measured with 1 threads, not 2"):
        two_scans.measure([pair], output, names, 2)


def test_the_command_prints_a_table(
    pair: Pair, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(two_scans, "list_pairs", lambda what, data, count: [pair] * (what == "hippocampus"))
    before = torch.get_num_threads()
    try:
        two_scans.main(["--methods", "good", "--threads", "1", "--output", str(tmp_path / "out.json")])
        with pytest.raises(SystemExit, match="1 runs failed"):
            two_scans.main(["--methods", "bad", "--threads", "1", "--output", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "| good | 1.000 | " in printed and "1 thread(s); 0.0 min now" in printed


def test_tables_hold_means_of_what_there_is() -> None:
    common = {"what": "brain", "run": "x", "folds": 0.0}
    rows = [
        {**common, "pair": "1", "method": "a", "lncc": 0.2, "search_s": 1.0},
        {**common, "pair": "1", "method": "b", "lncc": float("nan"), "search_s": 1.0, "command_s": 2.0},
        {**common, "pair": "2", "method": "a", "lncc": 0.4, "search_s": 2.0},
    ]
    assert two_scans.tables(rows).splitlines() == [
        "brain",
        "",
        "| method | lncc | folds | search_s | command_s | pairs |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.300 | 0.000 | 1.5 |  | 2 |",
        "| b |  | 0.000 | 1.0 | 2.0 | 1 |",
    ]


def test_pairs_are_files_that_are_there(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no brain pair"):
        list_pairs("brain", tmp_path, 1)
    with pytest.raises(ValueError, match="got 'heart'"):
        list_pairs("heart", tmp_path, 1)
    found = list_pairs("hippocampus", shared / "data", 2)
    assert [pair.name for pair in found] == [
        "hippocampus_311_to_hippocampus_053",
        "hippocampus_276_to_hippocampus_311",
    ]
    assert found[0].labels == (1, 2) and found[0].moving_label is not None and found[0].moving_label.is_file()
    (brain,) = list_pairs("brain", shared / "data", 2)
    assert brain.labels == () and brain.fixed.name == "image_B_full_size.nii.gz" and brain.moving.is_file()
