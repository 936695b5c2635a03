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
"""Inference over a list of pairs, with the shipped weights of every bundle."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.data.contrast import make_contrast_pair
from common.io import load_image, save_image
from tests.bundles.commands import read_config, rows, run_bundle, succeed

# What makes a bundle fast enough for a test; the dimension of the weights that it ships.
BUNDLES: dict[str, tuple[int, dict[str, Any]]] = {
    "dual_stream_pyramid": (2, {}),
    "gradirn": (2, {}),
    "similarity_learning": (2, {"iterations": 4, "samples": 2}),
    "spatially_varying_reg": (2, {"inverse": True}),
    "ssl_pretrain": (3, {}),
}
SIZES = {2: ((20, 26), (25, 18)), 3: ((16, 12, 14), (12, 15, 13))}
GOOD = ("süb 0_moving_to_süb 0_fixed", "second")


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two good pairs of different size, the first with labels, and one whose moving scan is cut off."""
    tables = {}
    for dims, sizes in SIZES.items():
        folder = tmp_path_factory.mktemp(f"{dims} d")
        for number, size in enumerate(sizes):
            pair = make_contrast_pair(size, subject=number)
            for key in ("moving", "fixed", "moving_label", "fixed_label"):
                array = getattr(pair, key).numpy() * (1 if "label" in key else np.float32(700))
                save_image(folder / f"süb {number}" / f"{key}.nii.gz", array, np.diag([-1.5, 1.2, 1, 1]))
        (folder / "broken.nii.gz").write_bytes((folder / "süb 0/moving.nii.gz").read_bytes()[:-40])
        tables[dims] = folder / "pairs.csv"
        with open(tables[dims], "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["moving", "fixed", "moving_label", "fixed_label", "id"])
            writer.writerow(
                [f"süb 0/{key}.nii.gz" for key in ("moving", "fixed", "moving_label", "fixed_label")] + [""]
            )
            writer.writerow(["broken.nii.gz", "süb 0/fixed.nii.gz", "", "", "bad"])
            writer.writerow(["süb 1/moving.nii.gz", "süb 1/fixed.nii.gz", "", "", "second"])
    return tables


def images(folder: Path) -> dict[str, np.ndarray]:
    """Every image and field in a folder."""
    files: dict[str, Any] = {path.name: nib.load(path) for path in sorted(folder.glob("*.nii.gz"))}
    return {name: np.asarray(file.dataobj) for name, file in files.items()}


@pytest.mark.parametrize("bundle", sorted(BUNDLES))
def test_a_list_is_registered_as_its_pairs_are_alone(
    repository: Path, lists: dict[int, Path], tmp_path: Path, bundle: str
) -> None:
    dims, options = BUNDLES[bundle]
    command: dict[str, Any] = {"pairs": lists[dims], "output_dir": tmp_path / "out", **options}
    text = succeed(run_bundle(bundle, repository, "inference", **command))
    assert "1 of 3 pairs could not be registered" in text and "broken.nii.gz" in text
    table = {row["id"]: row for row in rows(tmp_path / "out/metrics.csv")}
    assert list(table) == [GOOD[0], "bad", "second"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == sorted(GOOD)
    first, bad, second = table.values()
    assert "broken.nii.gz" in bad["error"] and not first["error"] and not second["error"]
    assert 0 < float(first["dice_mean"]) <= 1 and 0 < float(first["dice_before_mean"]) <= 1
    assert second["dice_mean"] == bad["similarity"] == "nan" and 0 < float(second["similarity"]) <= 1
    summary = {row["metric"]: row["count"] for row in rows(tmp_path / "out/summary.csv")}
    assert (summary["similarity"], summary["dice_mean"]) == ("2", "1")
    assert load_image(tmp_path / "out/second/moved.nii.gz").array.shape == SIZES[dims][1]
    assert (tmp_path / "out" / GOOD[0] / "moved_label.nii.gz").exists()

    whole = (tmp_path / "out/metrics.csv").read_bytes()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*")}
    text = succeed(run_bundle(bundle, repository, "inference", **command))
    assert "2 of 3 pairs are complete and skipped" in text
    assert (tmp_path / "out/metrics.csv").read_bytes() == whole
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*")}

    alone = {key: lists[dims].parent / f"süb 1/{key}.nii.gz" for key in ("moving", "fixed")}
    succeed(run_bundle(bundle, repository, "inference", output_dir=tmp_path / "alone", **alone, **options))
    single, listed = images(tmp_path / "alone"), images(tmp_path / "out/second")
    assert single.keys() == listed.keys() and {"moved.nii.gz", "ddf.nii.gz"} <= single.keys()
    assert all(np.array_equal(single[name], listed[name]) for name in single)
    assert not list((tmp_path / "alone").glob("*.csv"))
    assert "files" not in json.loads((tmp_path / "alone/metrics.json").read_text())


def test_stacks_of_slices_and_overwriting(repository: Path, tmp_path: Path) -> None:
    for number, height in enumerate((2, 3)):
        slices = [make_contrast_pair((18, 20), subject=5 * number + k) for k in range(height)]
        for key in ("moving", "fixed"):
            array = np.stack([getattr(each, key).numpy() for each in slices], -1)
            save_image(tmp_path / f"{key}{number}.nii", array, np.diag([1, 1, 8, 1]))
    (tmp_path / "pairs.csv").write_text("moving,fixed\nmoving0.nii,fixed0.nii\nmoving1.nii,fixed1.nii\n")
    command = {"pairs": tmp_path / "pairs.csv", "output_dir": tmp_path / "out", "stacks": True}
    succeed(run_bundle("gradirn", repository, "inference", **command))
    moved = tmp_path / "out/moving1_to_fixed1/moved.nii.gz"
    assert load_image(moved).array.shape == (18, 20, 3)
    before = moved.stat().st_mtime_ns
    text = succeed(run_bundle("gradirn", repository, "inference", **command, overwrite=True))
    assert "are complete and skipped" not in text and moved.stat().st_mtime_ns > before


def test_a_list_without_any_good_pair_fails_and_says_why(repository: Path, tmp_path: Path) -> None:
    # Constant scans have a good header: what is wrong with them is found out pair by pair.
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.nii", np.full((16, 16), 3.0), np.eye(4))
    (tmp_path / "pairs.csv").write_text("moving,fixed\na.nii,b.nii\nb.nii,a.nii\n")
    command = {"pairs": tmp_path / "pairs.csv", "output_dir": tmp_path / "out"}
    result = run_bundle("gradirn", repository, "inference", **command)
    assert result.returncode != 0 and "2 of 2 pairs could not be registered" in result.stdout + result.stderr
    assert all("every voxel is 3.0" in row["error"] for row in rows(tmp_path / "out/metrics.csv"))
    result = run_bundle("gradirn", repository, "inference", pairs=tmp_path / "pears.csv", output_dir=tmp_path / "out")
    assert result.returncode != 0 and "no table of pairs at" in result.stderr and "pears.csv" in result.stderr


def test_what_is_the_same_in_all_bundles_is_written_alike(repository: Path) -> None:
    configs = {bundle: read_config(bundle, repository, "inference") for bundle in BUNDLES}
    for config in configs.values():
        config["folders"] = {**config["folders"], "settings": None}  # each bundle has its own options
    for key in ("pairs", "split", "overwrite", "moving", "fixed", "folders", "dataset", "dataloader", "inferer"):
        assert len({json.dumps(config[key]) for config in configs.values()}) == 1, key
    for bundle, config in configs.items():
        assert config["listed"]["_target_"] == "common.data.PairList", bundle
        assert config["evaluator"]["_target_"] == "common.engines.PairsEvaluator", bundle
        # The table reads what the writer has written.
        assert config["handlers"][-1]["_target_"] == "common.handlers.PairsTable", bundle
        assert "models/model.pt" in config["checkpoint"], bundle


# What says which pairs there are and where results go; what is no option; what each pair has of its own.
NO_SETTINGS = {
    *("imports", "bundle_root", "output_dir", "device", "dataset_dir", "pairs", "split", "overwrite", "report"),
    *("moving", "fixed", "moving_label", "fixed_label", "moving_points", "fixed_points", "points_space"),
    *("frame", "moving_frame", "fixed_frame", "spatial_dims", "handlers", "loaded", "run"),
}


@pytest.mark.parametrize("bundle", sorted(BUNDLES))
def test_a_list_is_done_again_for_every_option_that_changes_results(repository: Path, bundle: str) -> None:
    config = read_config(bundle, repository, "inference")
    options = {key for key, value in config.items() if not isinstance(value, dict)} - NO_SETTINGS
    settings = config["folders"]["settings"]
    assert options <= set(settings), options - set(settings)
    assert all(value == f"@{key}" for key, value in settings.items())
    assert {"checkpoint", "refine", "affine", "spacing", "intensity"} <= options


def test_a_list_with_landmarks_is_redone_where_options_changed(repository: Path, tmp_path: Path) -> None:
    """Landmarks that lie 3 mm from their partners before the network, of one pair of two."""
    pair = make_contrast_pair((24, 20), subject=0)
    for key in ("moving", "fixed"):
        save_image(tmp_path / f"{key}.nii", np.float32(700) * getattr(pair, key).numpy(), np.diag([1.5, 1, 1, 1]))
    (tmp_path / "m.csv").write_text("x,y,z\n10,12,0\n12,8,0\n")
    (tmp_path / "f.csv").write_text("x,y,z\n10,9,0\n12,5,0\n")
    header = "moving,fixed,moving_points,fixed_points,id"
    (tmp_path / "pairs.csv").write_text(f"{header}\nmoving.nii,fixed.nii,m.csv,f.csv,a\nfixed.nii,moving.nii,,,b\n")
    command = {"pairs": tmp_path / "pairs.csv", "output_dir": tmp_path / "out", "affine": "none"}
    succeed(run_bundle("gradirn", repository, "inference", **command))
    first = {row["id"]: row for row in rows(tmp_path / "out/metrics.csv")}
    assert float(first["a"]["tre_before"]) == pytest.approx(3.0) and 0 < float(first["a"]["tre"]) < 6
    assert first["b"]["tre"] == "nan" and "tre_initial" not in first["a"]
    text = succeed(run_bundle("gradirn", repository, "inference", **command, refine=2))
    assert "2 of 2 pairs were registered before with refine 0, now 2: done again: a, b" in text
    second = {row["id"]: row for row in rows(tmp_path / "out/metrics.csv")}
    assert float(second["a"]["tre_network"]) == pytest.approx(float(first["a"]["tre"]), abs=1e-4)
    assert "2 of 2 pairs are complete" in succeed(run_bundle("gradirn", repository, "inference", **command, refine=2))
