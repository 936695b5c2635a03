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
import os
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.colors import to_rgb

from common.handlers import RegistrationWriter
from common.handlers.figures import FOLD_COLOUR
from common.handlers.pair_report import report_points
from common.handlers.registered import RegisteredPair
from common.io import GridError, PairFolders, load_field, load_image

SHAPE = (9, 8, 7)


def scan(path: Path, array: Any) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Any]:
    image = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    label = (image > 0.5).astype(np.uint8)
    files = {"moving": image, "fixed": image[::-1].copy(), "moving_label": label}
    return {name: scan(tmp_path / f"{name}.nii.gz", array) for name, array in files.items()}


def register(
    folder: Path,
    pair: dict[str, Any],
    *,
    shift: float = 1.0,
    inverse: bool | str = "auto",
    weight: torch.Tensor | None = None,
    ddf: torch.Tensor | None = None,
    timings: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    refinement: dict[str, float] | None = None,
    alignment: list[str] | None = None,
    **options: Any,
) -> list[int]:
    """Write a shift along the first axis, or a field; returns how many batches were processed.

    ``inverse`` true has the network give one; a string is an option of the writer.
    """
    processed: list[int] = []

    def step(engine: Engine, batch: Any) -> dict[str, Any]:
        processed.append(batch)
        measured = {"dice": torch.tensor([[0.5, float("nan")]])}
        field = torch.zeros(1, 3, *SHAPE)
        field[:, 0] = shift
        field = field if ddf is None else ddf
        grids = {name: torch.eye(4, dtype=torch.float64)[None] for name in ("fixed_affine", "moving_affine")}
        fields: dict[str, Any] = {"ddf": field, "inverse_ddf": -field} if inverse is True else {"ddf": field}
        more = {"weight_map": weight, "timings": timings, "warnings": warnings, "refinement": refinement}
        more |= {"alignment": alignment}
        fields |= {name: value for name, value in more.items() if value is not None}
        return {"moving_id": ["moving"], "fixed_id": ["fixed"], "metrics": measured, **fields, **grids}

    engine = Engine(step)
    options |= {"inverse": inverse} if isinstance(inverse, str) else {}
    RegistrationWriter(folder, [pair], **options).attach(engine)
    try:
        engine.run([0])
    except Exception:
        assert not processed, "what is wrong must be found before the network works"
        raise
    return processed


def test_files_hold_the_shifted_scan_and_label_and_the_field(pair: dict[str, Any], tmp_path: Path) -> None:
    register(tmp_path / "out", pair, field_format="l2r")
    moving, moved = load_image(pair["moving"]).array, load_image(tmp_path / "out/moved.nii.gz").array
    assert np.allclose(moved[:-1], moving[1:], atol=1e-6) and not moved[-1].any()
    label, moved_label = load_image(pair["moving_label"]).array, load_image(tmp_path / "out/moved_label.nii.gz").array
    assert np.array_equal(moved_label[:-1], label[1:]) and not moved_label[-1].any()
    ddf = load_field(tmp_path / "out/ddf.nii.gz", fmt="l2r")
    assert torch.allclose(ddf[0, 0], torch.ones(SHAPE)) and not ddf[0, 1:].any()
    said = json.loads((tmp_path / "out/metrics.json").read_text())
    assert said["dice"] == [0.5, None] and set(said) == {"dice", "timings", "inverse_residual_mm"}
    assert said["timings"].keys() == {"write"} and said["inverse_residual_mm"] < 1e-3


def test_the_inverse_lies_on_the_moving_grid(pair: dict[str, Any], tmp_path: Path) -> None:
    # The moving file has voxels of half the size along the last axis; the network saw both on one grid of 1 mm.
    fine = np.repeat(load_image(pair["moving"]).array, 2, axis=2)[:, :, :-1]
    nib.save(nib.Nifti1Image(fine, np.diag([1, 1, 0.5, 1.0])), pair["moving"])
    register(tmp_path / "out", {k: v for k, v in pair.items() if k != "moving_label"}, inverse=True, field_format="l2r")
    fixed, back = load_image(pair["fixed"]).array, load_image(tmp_path / "out/inverse_moved.nii.gz")
    assert back.array.shape == fine.shape and np.allclose(back.spacing, (1, 1, 0.5))
    assert np.allclose(back.array[1:, :, ::2], fixed[:-1], atol=1e-5) and not back.array[0].any()
    field = load_field(tmp_path / "out/inverse_ddf.nii.gz", fmt="l2r")[0]
    # From fine voxel k along the last axis to voxel k / 2 of the fixed grid.
    expected = -np.arange(fine.shape[2]) / 2
    assert torch.allclose(field[0], -torch.ones(fine.shape)) and np.allclose(field[2].numpy(), expected, atol=1e-5)


def test_a_map_lies_on_the_grid_of_the_fixed_file(pair: dict[str, Any], tmp_path: Path) -> None:
    # The fixed file runs the other way along the first axis, is finer along the last and wider along the second.
    affine = np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, -1], [0, 0, 0.5, 0], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(np.random.default_rng(1).random((9, 10, 13)).astype(np.float32), affine), pair["fixed"])
    weight = torch.linspace(0, 1, SHAPE[2]).expand(1, 1, *SHAPE).clone()
    weight[:, :, 0] = 0.25
    register(tmp_path / "out", pair, weight=weight)
    found = load_image(tmp_path / "out/weight_map.nii.gz")
    assert found.array.shape == (9, 10, 13) and np.allclose(found.affine, affine)
    assert np.allclose(found.array[:-1], np.linspace(0, 1, 13), atol=1e-6)
    assert np.allclose(found.array[-1], 0.25)
    register(tmp_path / "none", pair, weight=weight, maps=[])
    assert not (tmp_path / "none/weight_map.nii.gz").exists()


WAY_THERE = {"ddf.nii.gz", "ddf.json", "transform.h5", "transform.json"}
BROUGHT_BACK = "inverse_moved.nii.gz"
WAY_BACK = {f"inverse_{name}" for name in (*WAY_THERE, "moved.nii.gz")}
ALWAYS = {"moved.nii.gz", "moved_label.nii.gz", "jacobian.nii.gz", "registration.png", "metrics.json"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"inverse": "network"}, ALWAYS | {"ddf.nii.gz", "ddf.json"}),
        (
            {"inverse": True},
            ALWAYS | {"ddf.nii.gz", "ddf.json", "inverse_ddf.nii.gz", "inverse_ddf.json"} | {BROUGHT_BACK},
        ),
        ({"inverse": "auto", "field_format": ["itk", "composite"]}, ALWAYS | WAY_THERE | WAY_BACK),
        ({"inverse": "none", "field_format": ["itk"]}, ALWAYS | {"ddf.nii.gz", "ddf.json"}),
        ({"inverse": "none", "field_format": ["composite"]}, ALWAYS | {"transform.h5", "transform.json"}),
        ({"inverse": "none", "field_format": "l2r"}, ALWAYS | {"ddf.nii.gz", "ddf.json"}),
        (
            {"inverse": "none", "field_format": ["itk", "l2r"]},
            ALWAYS | {"ddf.nii.gz", "ddf.json", "ddf_l2r.nii.gz", "ddf_l2r.json"},
        ),
    ],
)
def test_as_much_is_written_as_was_asked_for(
    pair: dict[str, Any], tmp_path: Path, options: dict[str, Any], expected: set[str]
) -> None:
    register(tmp_path / "out", pair, **options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


def test_what_is_known_of_a_pair_is_said_beside_the_transform(pair: dict[str, Any], tmp_path: Path) -> None:
    bundle = tmp_path / "some_bundle"
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs/metadata.json").write_text('{"version": "1.2.3"}')
    register(tmp_path / "out", pair, bundle=bundle, field_format=["itk", "composite"], inverse="auto")
    for name in ("ddf", "transform", "inverse_ddf", "inverse_transform"):
        said = json.loads((tmp_path / f"out/{name}.json").read_text())
        assert said["fixed_file"] == str(pair["fixed"]) and said["moving_file"] == str(pair["moving"]), name
        assert said["fixed_shape"] == said["moving_shape"] == list(SHAPE) and said["bundle"] == "some_bundle 1.2.3"
        assert said["units"] == "mm" and said["axes"] == "LPS" and np.allclose(said["moving_affine_ras"], np.eye(4))
        there = "inverse" not in name
        assert said["direction"].startswith("fixed to moving: moved(x)" if there else "moving to fixed: inverse_moved(")
        assert there or (said["inversion"].startswith("numerical") and said["residual_mm"] < 1e-3)
    register(tmp_path / "own", pair, inverse=True)
    said = json.loads((tmp_path / "own/inverse_ddf.json").read_text())
    assert "by the method" in said["inversion"] and "residual_mm" not in said
    assert "inverse_residual_mm" not in json.loads((tmp_path / "own/metrics.json").read_text())


def test_the_report_is_told_what_is_known(pair: dict[str, Any], tmp_path: Path) -> None:
    notes = {"warnings": ["the scans hardly overlap\nthe labels differ"], "refinement": {"iterations": 7}}
    register(
        tmp_path / "out", {**pair, "fixed_label": pair["moving_label"]}, report=True, bundle="some_bundle", **notes
    )
    page = (tmp_path / "out/report.html").read_text()
    for text in ("the scans hardly overlap", "the labels differ", "Registration by some_bundle", "dice"):
        assert text in page, text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["refinement"] == {"iterations": 7}


def test_the_report_says_what_was_done_and_names_labels(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/somewhere/python", "-m", "common", "register", "--moving", "a b.nii.gz"])
    output = {"refinement": {"iterations": 7, "loss_before": 0.5, "loss_after": 0.25}, "alignment": ["rigid: ncc 0.1"]}
    register(tmp_path / "out", pair, report=True, bundle="some_bundle", columns={"dice": ("left", "right")}, **output)
    page = (tmp_path / "out/report.html").read_text()
    done = ["rigid: ncc 0.1", "some_bundle", "7 iterations, loss 0.5 before, 0.25 after", "left", "right"]
    for text in (*done, "python -m common register --moving &#x27;a b.nii.gz&#x27;"):
        assert f">{text}<" in page, text
    assert json.loads((tmp_path / "out/metrics.json").read_text())["columns"] == {"dice": ["left", "right"]}


@pytest.mark.parametrize("space", ["ras", "lps", "voxel"])
def test_landmarks_lie_where_the_pair_has_them(pair: dict[str, Any], tmp_path: Path, space: str) -> None:
    """A network that shifts by a voxel along the first axis, in each of the spaces of points."""
    points = np.array([[3.0, 4.0, 2.0], [5.0, 2.0, 3.0]])
    sign = {"ras": [1, 1, 1], "lps": [-1, -1, 1], "voxel": [1, 1, 1]}[space]
    for role in ("moving", "fixed"):
        lines = ["x,y,z", *(",".join(map(str, row)) for row in points * sign)]
        (tmp_path / f"{role}.csv").write_text("\n".join(lines))
    own = {f"{role}_points": tmp_path / f"{role}.csv" for role in ("moving", "fixed")} | {"points_space": space}
    field = torch.zeros(1, 3, *SHAPE)
    field[:, 0] = 1.0
    grids = {name: torch.eye(4, dtype=torch.float64)[None] for name in ("fixed_affine", "affine_matrix")}
    grids["affine_matrix"][:, 1, 3] = 2.0  # and an affine map that shifts by two along the second
    grids["moving_affine"] = grids["affine_matrix"]
    found = RegisteredPair({**pair, **own}, {"ddf": field, **grids}, 0)
    placed = report_points(found, found.transform().inverse()[0])
    np.testing.assert_allclose(placed["fixed_points"], points)
    np.testing.assert_allclose(placed["before_points"], points - [0, 2, 0])
    np.testing.assert_allclose(placed["moved_points"], points - [1, 2, 0], atol=1e-4)
    assert report_points(found, None).keys() == {"fixed_points", "before_points"}
    assert report_points(RegisteredPair(pair, {"ddf": field, **grids}, 0), None) == {}


def test_the_log_says_what_took_how_long_and_what_is_where(
    pair: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("of an earlier run")
    os.utime(tmp_path / "out/report.html", (1e9, 1e9))
    with caplog.at_level("INFO", logger="common.handlers.writer"):
        register(tmp_path / "out", pair, timings={"load": 0.25, "network": 2.0}, inverse="network")
    told = [record.getMessage() for record in caplog.records if record.name == "common.handlers.writer"]
    assert told[0].startswith(f"{tmp_path / 'out'}: load 0.2 s, network 2.0 s, write ")
    lines = [line.split()[0] for line in told[1].splitlines()[1:]]
    assert sorted(lines) == sorted(ALWAYS | {"ddf.nii.gz"}), "each file, one phrase; nothing of an earlier run"


def test_a_frame_of_a_series_is_written_as_it_was_registered(pair: dict[str, Any], tmp_path: Path) -> None:
    single, labels = (load_image(pair[name]).array for name in ("moving", "moving_label"))
    register(tmp_path / "single", pair)
    scan(pair["moving"], np.stack([single * 0, single], -1))
    for stored in (labels, np.stack([labels * 0, labels], -1)):  # a label map for all frames, or one for each
        scan(pair["moving_label"], stored)
        register(tmp_path / "frame", {**pair, "moving_frame": 1})
        for name in ("moved", "moved_label"):
            a, b = (load_image(tmp_path / f"{folder}/{name}.nii.gz").array for folder in ("single", "frame"))
            assert np.array_equal(a, b) and a.any(), name


def test_seconds_of_the_stages_are_those_of_the_pair(pair: dict[str, Any], tmp_path: Path) -> None:
    timings = {"load": torch.tensor([1.5, 2.0]), "network": 0.25}
    register(tmp_path / "out", pair, timings=timings)
    found = json.loads((tmp_path / "out/metrics.json").read_text())["timings"]
    assert found["load"] == 1.5 and found["network"] == 0.25 and found["write"] > 0


@pytest.mark.parametrize(("lowest", "outside"), [(-1000.0, -1000.0), (0.0, 0.0), (7.0, 0.0)])
def test_outside_of_a_scan_is_air(pair: dict[str, Any], tmp_path: Path, lowest: float, outside: float) -> None:
    array = np.full(SHAPE, lowest, np.float32)
    array[4] += 50
    scan(pair["moving"], array)
    register(tmp_path / "out", {k: v for k, v in pair.items() if k != "moving_label"}, shift=1.5)
    moved = load_image(tmp_path / "out/moved.nii.gz").array
    # Row 7 lies half a voxel beyond the last one.
    assert np.allclose(moved[8], outside) and np.allclose(moved[7], (lowest + outside) / 2)
    assert np.allclose(moved[3], lowest + 25) and np.allclose(moved[2], lowest + 25)


def test_a_field_that_folds_has_no_inverse_and_that_is_said(
    pair: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folding = torch.zeros(1, 3, *SHAPE)
    folding[:, 0, 4], folding[:, 0, 5] = 3.0, -3.0
    register(tmp_path / "out", pair, ddf=folding)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    folded = int((load_image(tmp_path / "out/jacobian.nii.gz").array <= 0).sum())
    assert "no inverse everywhere" in warned and str(tmp_path / "out") in warned
    assert folded > 0 and f"folds at {folded} voxels (" in warned


def test_a_label_on_another_grid_is_refused(pair: dict[str, Any], tmp_path: Path) -> None:
    scan(pair["moving_label"], np.ones((5, 8, 7), np.uint8))
    with pytest.raises(GridError, match=r"moving.nii.gz and .*moving_label.nii.gz .*\(9, 8, 7\) != \(5, 8, 7\)"):
        register(tmp_path / "out", pair)


def test_an_image_for_a_label_is_refused(pair: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"moving.nii.gz must hold whole numbers"):
        register(tmp_path / "out", {**pair, "moving_label": pair["moving"]})


def test_a_folder_that_cannot_be_made_is_named(pair: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out .*choose another output_dir"):
        register(tmp_path / "file/out", pair)


def test_a_result_does_not_replace_what_it_comes_from(pair: dict[str, Any], tmp_path: Path) -> None:
    pair["moving"] = pair["moving"].rename(tmp_path / "moved.nii.gz")
    with pytest.raises(ValueError, match=r"moved.nii.gz would be replaced .* choose another --output_dir"):
        register(tmp_path, pair)
    assert not (tmp_path / "ddf.nii.gz").exists() and register(tmp_path / "out", pair)


def test_nothing_of_an_earlier_run_is_left(pair: dict[str, Any], tmp_path: Path) -> None:
    register(tmp_path, pair, field_format=["itk", "composite"], report=True)
    assert (tmp_path / "inverse_transform.json").exists() and (tmp_path / "report.html").exists()
    (tmp_path / "notes.json").touch()
    register(tmp_path, pair, inverse="none")
    results = {"moved.nii.gz", "moved_label.nii.gz", "ddf.nii.gz", "ddf.json", "jacobian.nii.gz"}
    results |= {"registration.png", "metrics.json"}
    assert {path.name for path in tmp_path.iterdir()} == results | {path.name for path in pair.values()} | {
        "notes.json"
    }


def test_an_unknown_format_is_refused_at_once(tmp_path: Path) -> None:
    for forms in ("itkk", ["itk", "itkk"]):
        with pytest.raises(ValueError, match=r"field_format \['itkk'\], expected one of \['itk', 'l2r', 'composite'\]"):
            RegistrationWriter(tmp_path, [], field_format=forms)
    with pytest.raises(ValueError, match="unknown inverse 'exact', expected one of"):
        RegistrationWriter(tmp_path, [], inverse="exact")


def test_the_picture_compares_scans_of_different_range(pair: dict[str, Any], tmp_path: Path) -> None:
    register(tmp_path / "plain", pair)
    fixed = load_image(pair["fixed"])
    nib.save(nib.Nifti1Image(fixed.array.astype(np.float32) * 1000 + 500, fixed.affine_3d), pair["fixed"])
    register(tmp_path / "bright", pair)
    plain, bright = (matplotlib.image.imread(tmp_path / name / "registration.png") for name in ("plain", "bright"))
    assert plain.shape == bright.shape
    assert np.abs(plain - bright).mean() < 0.01


def test_the_picture_is_the_same_however_the_moving_file_is_stored(pair: dict[str, Any], tmp_path: Path) -> None:
    """Grid and Jacobian are those of the motion, not of the ways in which two files count their voxels."""
    x, y, z = (torch.arange(float(n)) for n in SHAPE)
    ddf = torch.zeros(1, 3, *SHAPE)
    ddf[0, 0] = torch.sin(x / 2)[:, None, None] * torch.cos(y / 3)[:, None] * torch.cos(z / 4)
    register(tmp_path / "as_is", pair, ddf=ddf)
    for key in ("moving", "moving_label"):
        turned = nib.load(pair[key]).as_reoriented(np.array([[2, -1], [0, -1], [1, 1]]))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), pair[key])
    register(tmp_path / "turned", pair, ddf=ddf)
    as_is, stored = (matplotlib.image.imread(tmp_path / name / "registration.png") for name in ("as_is", "turned"))
    assert as_is.shape == stored.shape and np.abs(as_is - stored).mean() < 1e-3
    red = np.abs(as_is[..., :3] - np.array(to_rgb(FOLD_COLOUR))).max(-1) < 0.02
    assert red.sum() < 50, "nothing folds, only the legend speaks of it"


def write_listed(folder: Path, listed: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The output of an evaluator of a list, after the writer has seen it."""
    grids = {name: torch.eye(4, dtype=torch.float64)[None] for name in ("fixed_affine", "moving_affine")}
    names = {"moving_id": ["a"], "fixed_id": ["b"], "id": ["x"]}
    engine = Engine(lambda engine, batch: {**names, "metrics": {"ndv": torch.tensor([[0.5]])}, **grids, **more})
    RegistrationWriter(folder, [listed], folders=PairFolders(folder)).attach(engine)
    engine.run([0])
    output: dict[str, Any] = engine.state.output  # type: ignore[assignment]
    return output


def test_a_pair_of_a_list_gets_its_folder_complete_at_the_end(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, folders = {**pair, "id": "x"}, PairFolders(tmp_path / "out")
    ddf = torch.zeros(1, 3, *SHAPE)
    assert "error" not in write_listed(tmp_path / "out", listed, ddf=ddf)
    assert folders.complete(listed) and (tmp_path / "out/x/moved_label.nii.gz").exists()
    assert not (tmp_path / "out/moved.nii.gz").exists()
    # A pair that was registered before is left alone; one that fails now has no results any more.
    assert "error" not in write_listed(tmp_path / "out", listed) and folders.complete(listed)
    write_listed(tmp_path / "out", listed, error=["no image"])
    assert not folders.complete(listed)

    def draw(*arguments: Any, **options: Any) -> None:
        assert not folders.complete(listed)
        raise ValueError("nothing to draw")

    folders.finish(listed, {})
    monkeypatch.setattr("common.handlers.writer.registration_figure", draw)
    assert write_listed(tmp_path / "out", listed, ddf=ddf)["error"] == ["nothing to draw"]
    assert not folders.complete(listed)


def test_a_full_disk_ends_a_list(pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("common.handlers.results.save_image", save)
    with pytest.raises(OSError, match="no space left"):
        write_listed(tmp_path / "out", {**pair, "id": "x"}, ddf=torch.zeros(1, 3, *SHAPE))
