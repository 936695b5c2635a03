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
"""Two processes do what one does: training, resuming, evaluating, registering a list of pairs; for every bundle.

The two are forks with the variables that torchrun sets; only one test starts torchrun itself. Rank 1 is given an output
folder of its own, in which nothing may appear.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.io import save_image
from tests.bundles.commands import rows, run_bundle, succeed, weights
from tests.processes import run_python
from tests.ranks import fork_two_ranks

EPOCHS = 2
# What would make one process of two pairs and two of one pair differ, though they are the same method. Heads start at
# weights of 1e-5, and at a field of 0 interpolation has a kink, where rounding chooses the gradient's side. Stochastic
# depth and the methods' own noise draw other numbers for each process.
STILL = """
import runpy, torch
from monai.networks.layers.drop_path import DropPath
normal = torch.nn.init.normal_
torch.nn.init.normal_ = lambda tensor, mean=0, std=1: normal(tensor, mean, max(std, 0.05))
DropPath.forward = lambda self, x: x
"""
QUIET = "torch.randn_like = torch.zeros_like"
CONSTANT = "torch.randn = lambda size, generator=None, device=None: torch.full(tuple(size), 0.3, device=device)"
SVR = {"embed_dim": 16, "num_heads": [2, 2, 2], "window_size": 2, "steps": 2}
PYRAMID = {"encoder_channels": [4, 4, 4, 8, 8], "decoder_channels": [4, 4, 4, 8, 8], "decoder": "conv_c"}
FLAT = {"cohort#spatial_size": 32, "spatial_size": [32, 32]}


@dataclass(frozen=True)
class Case:
    """A bundle on the smallest data it runs on."""

    bundle: str
    train: dict[str, Any]  # an epoch of two iterations with two pairs each
    two: dict[str, Any]  # the same epoch for two processes with one pair each
    evaluate: dict[str, Any]
    network: dict[str, Any] = field(default_factory=dict)
    register: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, ...] = (32, 32)  # of scans
    config: str = "train"
    before: str = ""  # what makes the method's own noise the same in all processes

    def __str__(self) -> str:
        return f"{self.bundle}-{self.config}"


# Adam forgets the scale of gradients, and makes a step of what rounding leaves of one that is 0.
_SGD = {"_target_": "torch.optim.SGD", "params": "$@network_def.parameters()", "lr": 0.001}
_ITERATION = {"train": {"epoch_length": 2, "batch_size": 2}, "two": {"epoch_length": 4, "batch_size": 1}}
_POLYNOMIAL = {"lr_scheduler#total_iters": 2 * EPOCHS}
CASES = [
    Case(
        "dual_stream_pyramid",
        {"spatial_size": [16, 18, 20], "restart_epochs": EPOCHS, "lncc_window": 5, **_ITERATION["train"]}
        | {"optimizer": {**_SGD, "lr": 1e-4}},
        _ITERATION["two"],
        {"spatial_size": [16, 16, 18]},
        PYRAMID,
        size=(16, 18, 20),
    ),
    Case(
        "gradirn",
        {"optimizer": {**_SGD, "lr": 0.05}, "train_count": 4, **_POLYNOMIAL, **FLAT, **_ITERATION["train"]},
        _ITERATION["two"],
        {"surface": False, **FLAT},
    ),
    Case(
        "similarity_learning",
        {"train_count": 4, "samples": 2, "iterations": 1, "first_iterations": 1, "val_iterations": 3, "steps": 4}
        # The inner loop is each pair's own affair, and its optimiser would make steps of what rounding leaves.
        | {"inner_learning_rate": 1e-6, "noise": 0}
        | {**_POLYNOMIAL, **FLAT, **_ITERATION["train"]},
        _ITERATION["two"],
        {"samples": 2, "iterations": 4, "steps": 4, "batch_size": 1, "surface": False, **FLAT},
        register={"samples": 2, "iterations": 4, "steps": 4},
        before=CONSTANT,
    ),
    Case(
        "spatially_varying_reg",
        {"train_count": 4, **_POLYNOMIAL, **FLAT, **_ITERATION["train"]},
        _ITERATION["two"],
        {"surface": False, **FLAT},
        SVR,
    ),
    Case(
        "ssl_pretrain",
        {"spatial_size": [16, 16, 16], "validation_pairs": 3, "pairs_per_epoch": 4, "batch_size": 2}
        # Weights that large make the variances of its heads, and their divergence, large too.
        | {"optimizer": {**_SGD, "lr": 1e-6}, **_POLYNOMIAL},
        {"batch_size": 1},
        {},
        before=QUIET,
    ),
    Case(
        "ssl_pretrain",
        {"spatial_size": [16, 16, 16], "lncc_window": 5, **_POLYNOMIAL, **_ITERATION["train"]},
        _ITERATION["two"],
        {"spatial_size": [16, 16, 16]},
        size=(16, 18, 20),
        config="finetune",
    ),
]


@dataclass
class Trained:
    """A run of one process, and one of two that was interrupted and resumed."""

    case: Case
    one: Path
    two: Path
    rank_1: Path
    cache: Path


def on_two_ranks(
    case: Case, repository: Path, configs: list[str], folders: tuple[Path, Path], **options: Any
) -> list[str]:
    """What both print, when both come to their end."""
    return fork_two_ranks(*(arguments(case, configs, folder, options) for folder in folders), repository=repository)


def alone(case: Case, repository: Path, configs: list[str], folder: Path, **options: Any) -> str:
    """What one process prints, when it comes to its end."""
    return succeed(run_python(arguments(case, configs, folder, options), repository, {"CUDA_VISIBLE_DEVICES": ""}))


def arguments(case: Case, configs: list[str], folder: Path, options: dict[str, Any]) -> list[str]:
    """``python -m monai.bundle run``, with the case's own start."""
    files = [f"bundles/{case.bundle}/configs/{name}.json" for name in configs]
    code = f"{STILL}\n{case.before}\nrunpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)"
    typed = ["-c", code, "run", "--config_file", str(files), "--output_dir", str(folder)]
    for key, value in options.items():
        typed += [f"--{key}", str(value)]
    return typed


@pytest.fixture(scope="module", params=CASES, ids=str)
def trained(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    case: Case = request.param
    folder = tmp_path_factory.mktemp(case.bundle)
    found = Trained(case, folder / "one", folder / "two", folder / "rank_1", folder / "data")
    options = {"optimizer": _SGD, **case.train, **case.network, "val_interval": EPOCHS}
    if case.config != "train" or case.bundle != "ssl_pretrain":
        options["dataset_dir"] = found.cache
    alone(case, repository, [case.config], found.one, max_epochs=EPOCHS, **options)
    options |= case.two
    configs = [case.config, "multi_gpu_train"]
    folders = (found.two, found.rank_1)
    on_two_ranks(case, repository, configs, folders, max_epochs=EPOCHS // 2, **options)
    on_two_ranks(case, repository, configs, folders, max_epochs=EPOCHS, resume=found.two / "last.pt", **options)
    return found


def losses(folder: Path) -> dict[str, list[float]]:
    """Every number of training, a value an epoch; files of several runs count as one."""
    events = EventAccumulator(str(folder))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("train/")]
    return {name: [event.value for event in events.Scalars(name)] for name in names}


def test_two_processes_learn_what_one_does_also_when_interrupted(trained: Trained) -> None:
    one, two = losses(trained.one), losses(trained.two)
    assert set(one) == set(two) and len(one["train/loss"]) == EPOCHS and len(set(one["train/loss"])) == EPOCHS
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    a, b = (weights(folder / "last.pt") for folder in (trained.one, trained.two))
    assert a["trainer"] == b["trainer"]
    for name, tensor in a["model"].items():
        torch.testing.assert_close(b["model"][name], tensor, atol=1e-4, rtol=1e-3)


def test_only_the_first_process_writes(trained: Trained) -> None:
    assert not trained.rank_1.exists()
    processes = {path.name.split(".")[-2] for path in trained.two.glob("**/events*")}
    assert len(processes) == 2, "the first process of each of the two runs"
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*.*") if "events" not in path.name}
        for folder in (trained.one, trained.two)
    ]
    assert {"last.pt", "model.pt", "metrics.csv", "summary.csv"} <= names[1]
    assert len(names[0]) == len(names[1])


def test_two_processes_measure_what_one_does(trained: Trained, repository: Path, tmp_path: Path) -> None:
    same_table(trained.one, trained.two, tolerance=0.02)  # after training: rounding adds up, and moves labels
    case = trained.case
    if not case.evaluate:
        return
    options = {"checkpoint": trained.one / "model.pt", "dataset_dir": trained.cache, "pictures": 1, **case.network}
    options |= {"pairs#data": "$getattr(@cohort, @split)[:3]", **case.evaluate}
    alone(case, repository, ["evaluate"], tmp_path / "one", **options)
    folders = (tmp_path / "two", tmp_path / "rank_1")
    on_two_ranks(case, repository, ["evaluate", "multi_gpu_evaluate"], folders, **options)
    same_table(tmp_path / "one", tmp_path / "two", tolerance=1e-6)
    assert len(rows(tmp_path / "two/metrics.csv")) == 3 and not folders[1].exists()
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_two_processes_register_a_list_as_one_does(trained: Trained, repository: Path, tmp_path: Path) -> None:
    case = trained.case
    if not case.evaluate:
        pytest.skip("this network is made for pretraining; that of finetune registers")
    listing = pairs_file(tmp_path, case.size)
    options = {"pairs": listing, "checkpoint": trained.one / "model.pt", **case.network, **case.register}
    alone(case, repository, ["inference"], tmp_path / "one", **options)
    together = (tmp_path / "two", tmp_path / "two")
    on_two_ranks(case, repository, ["inference", "multi_gpu_evaluate"], together, **options)
    same_table(tmp_path / "one", tmp_path / "two", tolerance=1e-6)
    assert files(tmp_path / "one") == files(tmp_path / "two") >= {"a/moved.nii.gz", "c/ddf.nii.gz", "summary.csv"}


def pairs_file(folder: Path, size: tuple[int, ...]) -> Path:
    """Three pairs of smooth images."""
    generator = torch.Generator().manual_seed(3)
    blur = torch.nn.functional.avg_pool2d if len(size) == 2 else torch.nn.functional.avg_pool3d
    for name in "uvw":
        image = blur(torch.rand(1, 1, *(n + 6 for n in size), generator=generator), 7, 1)[0, 0]
        save_image(folder / f"{name}.nii.gz", image.numpy(), np.eye(4))
    text = "moving,fixed,id\n" + "".join(f"{m}.nii.gz,{f}.nii.gz,{i}\n" for m, f, i in ("uva", "vwb", "wuc"))
    (folder / "pairs.csv").write_text(text)
    return folder / "pairs.csv"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.*")}


def same_table(one: Path, two: Path, tolerance: float) -> None:
    """All rows, in one order; the time of a pair is its own."""
    first, second = rows(one / "metrics.csv"), rows(two / "metrics.csv")
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert list(a) == list(b)
        for key in sorted({*a} - {"seconds"}):
            if key.endswith("id") or key == "error":
                assert a[key] == b[key]
            else:
                expected = pytest.approx(float(a[key]), rel=tolerance, abs=tolerance, nan_ok=True)
                assert float(b[key]) == expected, (key, a[key], b[key])


@pytest.mark.parametrize("name", ["multi_gpu_train", "multi_gpu_evaluate"])
def test_all_bundles_have_the_same_overlay(repository: Path, name: str) -> None:
    contents = {path.read_bytes() for path in repository.glob(f"bundles/*/configs/{name}.json")}
    assert len(contents) == 1 and len(list(repository.glob(f"bundles/*/configs/{name}.json"))) == 5
    assert b'"initialize"' not in contents.pop()


def test_torchrun_starts_them_and_alone_the_overlay_changes_nothing(repository: Path, tmp_path: Path) -> None:
    options = {"dataset_dir": tmp_path / "data", "max_epochs": 1, "epoch_length": 2, "batch_size": 1, **FLAT}
    for name, torchrun in (("two", True), ("one", False)):
        text = succeed(
            run_bundle(
                "gradirn",
                repository,
                "train",
                "multi_gpu_train",
                torchrun=torchrun,
                output_dir=tmp_path / name,
                val_interval=1,
                **options,
            )
        )
        assert "destroy_process_group" not in text, "the group is left at the end"
    assert len(rows(tmp_path / "one/metrics.csv")) == len(rows(tmp_path / "two/metrics.csv")) == 8
    assert [weights(tmp_path / name / "last.pt")["trainer"]["iteration"] for name in ("two", "one")] == [1, 2]
    assert not any(key.startswith("module.") for key in weights(tmp_path / "two/model.pt"))
