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
"""A zip is built, downloaded by MONAI into an environment that knows no checkout, and used there from other folders."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.io import load_image
from common.packaging import build_zip, bundle_names
from tests.bundles.clean_environment import CleanEnvironment
from tests.bundles.commands import rows, succeed, weights

BUNDLES = bundle_names(Path(__file__).resolve().parents[2])

PLANE: dict[str, Any] = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}
VOLUME: dict[str, Any] = {"cohort#spatial_size": 24, "spatial_size": [24, 24, 24]}
ONCE: dict[str, Any] = {"max_epochs": 1, "epoch_length": 2, "val_interval": 1}
FEW: dict[str, Any] = {"iterations": 8, "first_iterations": 8, "val_iterations": 8, "samples": 4, "steps": 5}
TRAIN: dict[str, dict[str, Any]] = {
    "dual_stream_pyramid": {
        **VOLUME,
        **ONCE,
        "encoder_channels": [4, 4, 4, 8, 8],
        "decoder_channels": [4, 4, 4, 8, 8],
    },
    "gradirn": {**PLANE, **ONCE},
    "similarity_learning": {**PLANE, **ONCE, **FEW, "batch_size": 2, "train_count": 3},
    "spatially_varying_reg": {**PLANE, **ONCE, "batch_size": 2, "train_count": 4, "embed_dim": 16, "window_size": 2},
    "ssl_pretrain": {"spatial_size": [24, 20, 22], "pairs_per_epoch": 2, "validation_pairs": 1, "max_epochs": 1},
}
SHORT_TEST = {"split": "validation", "pictures": 1}
# Evaluation and inference take the weights that are in the zip, for which the network has to be as large as they are.
EVALUATE: dict[str, dict[str, Any]] = {
    "dual_stream_pyramid": {**VOLUME, **SHORT_TEST},
    "gradirn": {**PLANE, **SHORT_TEST},
    "similarity_learning": {**PLANE, **SHORT_TEST, "iterations": 8, "samples": 4},
    "spatially_varying_reg": {**PLANE, **SHORT_TEST},
    "ssl_pretrain": {**VOLUME, **SHORT_TEST},
}
COHORT = {
    "dual_stream_pyramid": "synthetic",
    "gradirn": "cine",
    "similarity_learning": "contrast",
    "spatially_varying_reg": "sliding",
    "ssl_pretrain": "synthetic",
}
INFER: dict[str, dict[str, Any]] = {"similarity_learning": {"iterations": 8, "samples": 4}}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    environment = CleanEnvironment(tmp_path_factory.mktemp("clean"))
    yield environment
    environment.close()


def command(config: Path | str, options: dict[str, Any]) -> list[object]:
    """What follows ``python -m``, to run a config."""
    return [
        "monai.bundle",
        "run",
        "--config_file",
        config,
        *(part for key in options for part in (f"--{key}", options[key])),
    ]


def check_unchanged(bundle: Path) -> None:
    """A downloaded bundle is what ``sha256.txt`` says; Python may have left its caches there."""
    lines = [line.split("  ") for line in (bundle / "sha256.txt").read_text().splitlines()]
    for digest, name in lines:
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest, name
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {"sha256.txt", *(name for _, name in lines)}


def check_origin(clean: CleanEnvironment, bundle: Path, *but: str) -> None:
    """The core and the scripts, if any, that a run loaded are those of the bundle."""
    modules = {name: Path(file).resolve() for name, file in clean.loaded().items() if name not in but}
    assert "common.engines" in modules and "common.data" in modules
    assert [name for name, file in modules.items() if not file.is_relative_to(bundle.resolve())] == []


def scans(cache: Path, cohort: str) -> list[Path]:
    """Two images of a cohort that was made on first use."""
    return sorted(cache.glob(f"warpzoo/{cohort}_*/**/imagesTr/*.nii.gz"))[:2]


def test_the_environment_has_the_libraries_but_no_checkout(clean: CleanEnvironment, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec; print([bool(find_spec(name)) for name in ('monai', 'torch', 'common')])"
    )
    assert succeed(clean.run(["-c", code], tmp_path)).strip() == "[True, True, False]"


@pytest.mark.parametrize("name", BUNDLES)
def test_a_downloaded_zip_trains_evaluates_and_registers_from_anywhere(
    repository: Path, clean: CleanEnvironment, tmp_path: Path, name: str
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there, tmp_path / "zoo"):
        folder.mkdir()
    url = build_zip(repository, name, tmp_path / "dist").as_uri()
    download = ["monai.bundle", "download", "--name", name, "--url", url, "--bundle_dir", tmp_path / "zoo"]
    # A new interpreter takes seven seconds: for all bundles training has one, which is where a run starts from nothing.
    succeed(clean.run(["-m", *download], here) if name == "gradirn" else clean.fork(download, here))
    bundle = tmp_path / "zoo" / name
    check_unchanged(bundle)

    relative = Path("../zoo") / name / "configs"
    succeed(clean.run(["-m", *command(relative / "train.json", {**TRAIN[name], "output_dir": "trained"})], here))
    check_origin(clean, bundle)
    assert weights(here / "trained/model.pt") and rows(here / "trained/metrics.csv")

    succeed(clean.fork(command(bundle / "configs/evaluate.json", EVALUATE[name]), there))
    check_origin(clean, bundle)
    assert [path.name for path in there.iterdir()] == ["runs"] and rows(there / f"runs/{name}/evaluate/metrics.csv")

    moving, fixed = (os.path.relpath(path, here) for path in scans(clean.folder / "cache", COHORT[name]))
    options = {"moving": moving, "fixed": fixed, "output_dir": "registered", **INFER.get(name, {})}
    succeed(clean.fork(command(relative / "inference.json", options), here))
    check_origin(clean, bundle)
    assert load_image(here / "registered/moved.nii.gz").array.shape == load_image(here / fixed).array.shape
    assert sorted(path.name for path in here.iterdir()) == ["registered", "trained"]
    check_unchanged(bundle)


def test_a_zip_keeps_its_own_core_where_the_checkout_is_the_current_directory(
    repository: Path, clean: CleanEnvironment, tmp_path: Path
) -> None:
    with zipfile.ZipFile(build_zip(repository, "gradirn", tmp_path)) as archive:
        archive.extractall(tmp_path)
    bundle = tmp_path / "gradirn"
    options = {**PLANE, **ONCE, "output_dir": tmp_path / "trained"}
    succeed(clean.fork(command(bundle / "configs/train.json", options), repository))
    check_origin(clean, bundle, "common")
    assert Path(clean.loaded()["common"]).parent == repository / "common"
