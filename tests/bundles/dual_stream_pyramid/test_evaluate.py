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
"""The evaluation a user types, of this bundle's networks and of the others it is compared with."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from bundles.dual_stream_pyramid.scripts.pyramid import DualStreamPyramid
from common.data import load_cohort
from common.options import check_options
from tests.processes import run_python

CONFIGS = "bundles/dual_stream_pyramid/configs"
CHANNELS = {"encoder_channels": [4, 4, 8], "decoder_channels": [4, 8, 8]}


def run(repository: Path, *arguments: str) -> str:
    result = run_python(arguments, repository)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


def evaluate(repository: Path, *overlays: str, **options: Any) -> list[dict[str, str]]:
    """Run evaluate.json with overlays over two pairs of two dimensions; returns the table."""
    files = [f"{CONFIGS}/{name}.json" for name in ("evaluate", *overlays)]
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    run(repository, "-m", "monai.bundle", "run", "--config_file", str(files), "--spatial_size", "[48, 45]", *arguments)
    with open(Path(options["output_dir"]) / "metrics.csv") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two of the synthetic cohort's pairs, as a dataset JSON of somebody's own."""
    folder = tmp_path_factory.mktemp("data")
    synthetic = load_cohort("synthetic", folder, spatial_dims=2)
    content = {
        "name": "two",
        "labels": {str(value): name for value, name in synthetic.labels.items()},
        "evaluation_labels": [1, 3],
        "training": [],
        "test": synthetic.test[:2],
    }
    (folder / "two.json").write_text(json.dumps(content))
    return {"dataset": "two", "datalist": folder / "two.json", "dataset_dir": folder, "pictures": 0}


def organisers_dice(pair: dict[str, str], fields: Path, labels: list[int]) -> list[float]:
    """From the files alone: the field of a submission and the label maps of the data."""
    name = f"disp_{pair['fixed_id'].split('_')[1]}_{pair['moving_id'].split('_')[1]}.nii.gz"
    disp = np.asarray(nib.load(fields / name).dataobj, dtype=np.float64)
    fixed, moving = (np.squeeze(nib.load(pair[f"{role}_label"]).get_fdata()) for role in ("fixed", "moving"))
    identity = np.stack(np.meshgrid(*[np.arange(n) for n in fixed.shape], indexing="ij"))
    moved = map_coordinates(moving, identity + np.moveaxis(disp, -1, 0), order=0)
    maps = [((moved == label), (fixed == label)) for label in labels]
    return [2 * float((a & b).sum() / (a.sum() + b.sum())) for a, b in maps]


def test_both_definitions_the_inverse_and_the_fields(repository: Path, cohort: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DualStreamPyramid(2, "convic_c", **CHANNELS)
    for head in network.decoder.heads:
        torch.nn.init.normal_(head.flow.conv.weight, std=0.2)  # a head that starts at zero would move nothing
    torch.save(network.state_dict(), tmp_path / "model.pt")
    options = {"checkpoint": tmp_path / "model.pt", "definition": "both", "fields_dir": tmp_path / "fields"}
    rows = evaluate(repository, output_dir=tmp_path / "out", **options, **CHANNELS, **cohort)
    assert len(rows) == 2 and len(list((tmp_path / "fields").iterdir())) == 2
    expected = {f"{name}{end}" for name in ("dice", "hd95") for end in ("_1", "_3", "_mean", "_l2r_1", "_l2r_3")}
    expected |= {"ndv", "ndv_l2r", "sdlogj", "sdlogj_l2r", "seconds", "inverse_consistency", "inversion_iterations"}
    assert expected <= set(rows[0]) and "dice_2" not in rows[0]
    assert all(float(row["seconds"]) > 0 and float(row["inversion_iterations"]) >= 2 for row in rows)
    assert all(0 < float(row["inverse_consistency"]) < 0.5 for row in rows)
    pairs = json.loads(Path(cohort["datalist"]).read_text())["test"]
    for row, pair in zip(rows, pairs, strict=True):
        theirs = organisers_dice(pair, tmp_path / "fields", [1, 3])
        assert theirs == pytest.approx([float(row["dice_l2r_1"]), float(row["dice_l2r_3"])], abs=2e-3)
    with open(tmp_path / "out/summary.csv") as stream:
        assert {row["nan"] for row in csv.DictReader(stream)} == {"0"}


def test_greedy_stands_in_without_a_checkpoint(repository: Path, cohort: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("picsl_greedy", reason="picsl_greedy is not installed (extra [bench])")
    options = {"threads": 1, "affine": True, "inverse": True, "output_dir": tmp_path}
    rows = evaluate(repository, "greedy", **options, **cohort)
    for row in rows:
        assert float(row["dice_mean"]) > float(row["dice_before_mean"]) + 0.1
        assert float(row["inverse_consistency"]) < 1 and float(row["seconds"]) > 0
        assert "inversion_iterations" not in row


def test_every_network_takes_the_place_of_the_bundles_own(repository: Path) -> None:
    """Over each config that names a network; nothing of the bundle's own network may be left."""
    code = f"""
import sys, pathlib
sys.path.insert(1, "bundles/dual_stream_pyramid")
from monai.bundle import ConfigParser
for base in ("train", "evaluate", "inference"):
    for overlay in ("voxelmorph", "transmorph", "vfa", "sitreg"):
        files = [pathlib.Path("{CONFIGS}") / f"{{name}}.json" for name in (base, overlay)]
        if all(file.is_file() for file in files):
            parser = ConfigParser()
            parser.read_config([str(file) for file in files])
            parser["spatial_dims"] = 2
            network = parser.get_parsed_content("network_def")
            print("built", base, overlay, type(network).__name__, network.spatial_dims)
"""
    built = [line.split()[1:] for line in run(repository, "-c", code).splitlines() if line.startswith("built")]
    names = {"voxelmorph": "VoxelMorph", "transmorph": "TransMorph", "vfa": "VFANetwork", "sitreg": "SITReg"}
    bases = [name for name in ("train", "evaluate", "inference") if (repository / CONFIGS / f"{name}.json").is_file()]
    assert built == [[base, overlay, name, "2"] for base in bases for overlay, name in names.items()]


@pytest.mark.parametrize(
    ("overlay", "option"), [("greedy", "checkpoint"), ("voxelmorph", "decoder"), ("sitreg", "encoder_channels")]
)
def test_options_of_the_network_that_is_not_there_are_refused(
    repository: Path, overlay: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    content = json.loads((repository / CONFIGS / f"{overlay}.json").read_text())
    files = str([f"{CONFIGS}/{name}.json" for name in ("evaluate", overlay)])
    arguments = ["/site-packages/monai/bundle/__main__.py", "run", "--config_file", files, f"--{option}", "x"]
    with pytest.raises(ValueError, match=f"--{option} has no effect"):
        check_options(arguments, content["checked_options#without_effect"])
