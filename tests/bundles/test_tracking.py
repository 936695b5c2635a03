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
"""``--tracking mlflow`` of every bundle, and what a run leaves in the folder it is started in: nothing."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.io.headers import image_dims
from tests.bundles.commands import read_config, rows, succeed
from tests.processes import run_python

SMALL = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}
SHORT = {"max_epochs": 1, "epoch_length": 2, "val_interval": 1}
PAIRS = {"batch_size": 2, **SHORT, **SMALL}
VARIATIONAL = {"iterations": 4, "samples": 2, "steps": 4}
PYRAMID = {"encoder_channels": [4, 4, 4, 8, 8], "decoder_channels": [4, 4, 4, 8, 8]}

TRAININGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ssl_pretrain", "train"): {
        "spatial_size": [18, 14, 16],
        "pairs_per_epoch": 2,
        "validation_pairs": 1,
        "max_epochs": 2,
    },
    ("ssl_pretrain", "finetune"): {"spatial_size": [24, 24, 24], **SHORT},
    ("gradirn", "train"): PAIRS,
    ("spatially_varying_reg", "train"): {"embed_dim": 16, "num_heads": [2, 2, 2], "train_count": 4, **PAIRS},
    ("similarity_learning", "train"): {"first_iterations": 6, "val_iterations": 4, **VARIATIONAL, **PAIRS},
    ("similarity_learning", "train_vxm"): PAIRS,
    ("dual_stream_pyramid", "train"): {"spatial_size": [24, 20, 24], **PYRAMID, **SHORT},
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "ssl_pretrain": {"spatial_size": [24, 24, 24], "split": "validation"},
    "gradirn": {**SMALL, "split": "validation"},
    "spatially_varying_reg": {**SMALL, "split": "validation"},
    "similarity_learning": {**SMALL, "split": "validation", **VARIATIONAL},
    "dual_stream_pyramid": {"spatial_size": [24, 20, 24], "split": "validation"},
}


def tracked(bundle: str, name: str, repository: Path, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a config with tracking from an empty folder, ``folder/here``, into ``folder/out``."""
    here = folder / "here"
    here.mkdir(exist_ok=True)
    command = ["-m", "monai.bundle", "run", "--config_file", str(repository / f"bundles/{bundle}/configs/{name}.json")]
    for key, value in {"tracking": "mlflow", "output_dir": folder / "out", **options}.items():
        command += [f"--{key}", str(value)]
    quiet = {"PYTHONPATH": str(repository), "MLFLOW_DISABLE_TELEMETRY": "true"}
    return run_python(command, here, quiet)


def store(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/out/mlruns.db")


def runs(folder: Path) -> list[Run]:
    client = store(folder)
    return [run for each in client.search_experiments() for run in client.search_runs([each.experiment_id])]


def history(folder: Path, run: Run, name: str) -> dict[int, float]:
    return {value.step: value.value for value in store(folder).get_metric_history(run.info.run_id, name)}


def events(folder: Path) -> dict[str, dict[int, float]]:
    """All scalars of TensorBoard by name and step."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("out/events*"):
        accumulator = EventAccumulator(str(path)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in accumulator.Scalars(tag)})
    return found


def table_mean(folder: Path, metric: str) -> float:
    """The mean over pairs of a metric of the engine; of one that has a column a label, the mean over labels.

    One that could not be measured is no column, and NaN in the store.
    """
    means = {row["metric"]: float(row["mean"]) for row in rows(folder / "out/summary.csv")}
    return means.get(f"{metric}_mean", means.get(metric, math.nan))


def check_run(folder: Path, options: dict[str, Any]) -> Run:
    """What every tracked run has: its end, its options and its config; and its folder stays as empty as it was."""
    (run,) = runs(folder)
    assert run.info.status == "FINISHED"
    given = {key: str(value) for key, value in options.items() if "#" not in key}
    assert given.items() <= run.data.params.items()
    assert run.data.params["bundle_version"] == "0.1.0" and run.data.params["output_dir"] == str(folder / "out")
    (artifact,) = store(folder).list_artifacts(run.info.run_id)
    executed = json.loads((folder / "out/mlruns" / run.info.run_id / "artifacts" / artifact.path).read_text())
    assert {key: executed[key] for key in options if "#" not in key} == {
        key: value for key, value in options.items() if "#" not in key
    }
    assert not list((folder / "here").iterdir())
    return run


@pytest.mark.parametrize(("bundle", "name"), sorted(TRAININGS))
def test_a_training_is_tracked(bundle: str, name: str, repository: Path, cache: Path, tmp_path: Path) -> None:
    options = {**TRAININGS[bundle, name]}
    if name != "train" or bundle != "ssl_pretrain":
        options["dataset_dir"] = str(cache / bundle)
    handlers = read_config(bundle, repository, name)["train"]["handlers"]
    scalars = next(n for n, each in enumerate(handlers) if each["_target_"].endswith("TensorBoardScalars"))
    text = succeed(tracked(bundle, name, repository, tmp_path, **options, **{f"train#handlers#{scalars}#every": 1}))
    run = check_run(tmp_path, options)
    written = events(tmp_path)

    losses = {tag.partition("/")[2]: values for tag, values in written.items() if tag.startswith("train_iteration/")}
    assert len(losses) > 1 and all(len(values) == 2 * options["max_epochs"] for values in losses.values()), text
    for loss, values in losses.items():
        assert history(tmp_path, run, f"train_{loss}") == pytest.approx(values, rel=1e-5, nan_ok=True), loss

    epochs = set(range(1, options["max_epochs"] + 1))
    measured = {tag.partition("/")[2]: values for tag, values in written.items() if tag.startswith("validation/")}
    assert {"similarity", "similarity_before"} <= set(measured)
    for metric, values in measured.items():
        assert history(tmp_path, run, metric) == pytest.approx(values, rel=1e-5, nan_ok=True), metric
        assert set(values) == epochs
        assert values[max(epochs)] == pytest.approx(table_mean(tmp_path, metric), rel=1e-4, abs=1e-6, nan_ok=True), (
            metric
        )
    # A schedule that steps by iterations has done so when the rate is logged.
    assert 0 < history(tmp_path, run, "lr_group_0")[1] <= float(run.data.params["learning_rate"])


@pytest.mark.parametrize("bundle", sorted(EVALUATIONS))
def test_evaluation_and_inference_are_tracked(bundle: str, repository: Path, cache: Path, tmp_path: Path) -> None:
    for name, options in (("evaluate", EVALUATIONS[bundle]), ("inference", _scans(bundle, cache))):
        folder = tmp_path / name
        folder.mkdir()
        data = {**options, "dataset_dir": str(cache / bundle)}
        succeed(tracked(bundle, name, repository, folder, **data))
        run = check_run(folder, data)
        assert not any(metric.startswith("train_") for metric in run.data.metrics)
        assert {"similarity", "similarity_before", "folds"} <= set(run.data.metrics)
        single = _single(folder) if name == "inference" else {}
        for metric, value in run.data.metrics.items():
            expected = single.get(metric, math.nan) if single else table_mean(folder, metric)
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True), metric


def _scans(bundle: str, cache: Path) -> dict[str, Any]:
    """Two small scans that the evaluation left, and what makes their registration short."""
    images = sorted(p for p in (cache / bundle).rglob("*.nii.gz") if "label" not in str(p) and "mask" not in str(p))
    dims = len(EVALUATIONS[bundle]["spatial_size"])  # the cache is that of other tests too
    images = [path for path in images if image_dims(path) == dims]
    few = VARIATIONAL if bundle == "similarity_learning" else {}
    return {"moving": str(images[0]), "fixed": str(images[1]), **few} if images else few


def _single(folder: Path) -> dict[str, float]:
    """What the writer says of the only pair."""
    values = json.loads((folder / "out/metrics.json").read_text())
    measured = {name: value for name, value in values.items() if isinstance(value, list)}
    return {name: math.nan if value[0] is None else value[0] for name, value in measured.items()}


def test_a_run_that_was_killed_or_fails_is_not_gone_on_with(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    client = store(tmp_path)
    experiment = client.create_experiment("mine", artifact_location=f"file://{tmp_path}/out/mlruns")
    killed = client.create_run(experiment).info.run_id
    options = {**TRAININGS["ssl_pretrain", "train"], "experiment_name": "mine", "learning_rate": 1e30}
    result = tracked("ssl_pretrain", "train", repository, tmp_path, **options)
    assert result.returncode != 0 and "terms that are not finite" in result.stdout + result.stderr
    old = client.get_run(killed)
    assert old.info.status == "RUNNING" and not old.data.metrics and not old.data.params
    (failed,) = (run for run in runs(tmp_path) if run.info.run_id != killed)
    assert failed.info.status == "FAILED" and failed.data.metrics["train_loss"] != 0
    assert client.list_artifacts(failed.info.run_id)
