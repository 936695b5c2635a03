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
"""The configs hold to MONAI's bundle properties and to the published settings."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from tests.bundles.commands import missing_properties, python, read_config

CONFIGS = "bundles/similarity_learning/configs"
OVERLAYS = ("lcc", "bspline", "bound", "vxm", "paper_ukbb", "multi_gpu_train")
read = partial(read_config, "similarity_learning")

PARSE = """
import sys, torch
sys.path.insert(1, "bundles/similarity_learning")
from monai.bundle import ConfigParser
def parsed(*names, **options):
    parser = ConfigParser()
    parser.read_config([f"bundles/similarity_learning/configs/{name}.json" for name in names])
    for key, value in options.items():
        parser[key] = value
    return parser
"""


@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("train_vxm", "train"), ("inference", "infer")])
def test_monai_finds_every_property_it_asks_for(repository: Path, name: str, kind: str, tmp_path: Path) -> None:
    assert "missing: []" in missing_properties("similarity_learning", repository, name, kind, tmp_path)


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("similarity", ["ssd", "lcc"])
def test_the_published_setting_of_each_combination(repository: Path, transformation: str, similarity: str) -> None:
    overlays = ["paper_ukbb", *(["lcc"] if similarity == "lcc" else [])]
    overlays += ["bspline"] if transformation == "bspline" else []
    code = f"""{PARSE}
parser = parsed("train", *{overlays})
network, loop = (parser.get_parsed_content(key) for key in ("network_def", "inner_loop"))
problem = network.problem
steps, lattice = problem.transformation.steps, problem.transformation.lattice((128,) * 3)
print(problem.regularisation.weight, problem.noise, steps, lattice)
for each in (loop, network.inner_loop):
    print(each.iterations, each.learning_rate, each.levels, each.rank, each.sigma, each.factor)
print(sum(p.numel() for p in network.parameters()), network.similarity.kind, network.similarity.window)
print(*(parser.get_parsed_content(key) for key in ("learning_rate", "image_learning_rate", "batch_size", "max_epochs")))
"""
    lines = python(repository, code).splitlines()[-5:]
    weight = {"svf": {"ssd": 1.8, "lcc": 2.8}, "bspline": {"ssd": 1.4, "lcc": 2.0}}[transformation][similarity]
    lattice = (128, 128, 128) if transformation == "svf" else (67, 67, 67)
    assert lines[0] == f"{weight} 0.1 12 {lattice}"
    expected = "1344 0.02" if (transformation, similarity) == ("svf", "lcc") else "1024 0.01"
    assert lines[1] == lines[2] == f"{expected} (1,) 1 0.5 0.1"
    assert lines[3] == f"2728 {similarity} 1"
    assert lines[4] == "1e-05 0.001 5 50"


def test_the_baseline_has_nothing_to_learn_and_says_so(repository: Path, tmp_path: Path) -> None:
    code = f"""{PARSE}
parser = parsed("train", learnt=False, dataset_dir={str(tmp_path)!r}, output_dir={str(tmp_path / "out")!r})
try:
    parser.get_parsed_content("train#trainer")
except Exception as error:
    while error is not None:
        print(error)
        error = error.__cause__
"""
    found = python(repository, code)
    assert "nothing to learn" in found or "empty parameter list" in found


def test_voxelmorph_is_weighed_like_the_variational_energy(repository: Path, tmp_path: Path) -> None:
    """Data plus regularisation of a velocity, a voxel, are the same number in both jobs."""
    code = f"""{PARSE}
options = dict(dataset_dir={str(tmp_path / "data")!r}, output_dir={str(tmp_path / "out")!r})
torch.manual_seed(0)
moved, fixed, velocity = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64), torch.randn(1, 2, 64, 64)
mask = torch.ones(1, 1, 64, 64)
for overlays in ([], ["lcc"]):
    loss = parsed("train_vxm", *overlays, **options).get_parsed_content("loss")
    values = {{"moved": moved, "fixed": fixed, "fixed_mask": mask, "velocity": velocity, "ddf": velocity}}
    total, _ = loss(values)
    network = parsed("train", *overlays, **options).get_parsed_content("network_def")
    network.requires_grad_(False)
    data = network.similarity.energy(network.similarity.reference(fixed), moved)
    print(float(total), float(data + network.problem.regularisation(velocity)) / 64**2)
"""
    for line in python(repository, code).splitlines()[-2:]:
        ours, theirs = (float(number) for number in line.split())
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_overlays_change_only_what_the_config_has(repository: Path) -> None:
    known = {key for name in ("train", "train_vxm", "evaluate", "inference") for key in read(repository, name)}
    for name in OVERLAYS:
        keys = {key.split("#")[0] for key in read(repository, name)} - {"initialize", "finalize"}
        assert keys <= known, name


def test_evaluation_and_inference_share_the_keys_that_shape_a_registration(repository: Path) -> None:
    evaluate, inference = read(repository, "evaluate"), read(repository, "inference")
    assert evaluate["network_def"] == inference["network_def"]
    shared = {key for key in set(evaluate) & set(inference) if not isinstance(evaluate[key], (dict, list))}
    different = {key for key in shared if evaluate[key] != inference[key]}
    # "mri" of a pair of files is what "percentile" is of a cohort.
    assert different <= {"output_dir", "dataset", "dataset_dir", "spatial_dims", "intensity"}


def test_the_options_in_the_documentation_are_keys_with_these_defaults(repository: Path) -> None:
    text = (repository / "bundles/similarity_learning/docs/README.md").read_text()
    text = text.split("### Options")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| `")]
    configs = {name: read(repository, name) for name in ("train", "train_vxm", "evaluate", "inference")}
    known = {key for config in configs.values() for key in config}
    documented: dict[str, str] = {}
    named: set[str] = set()
    for keys, meaning, default in rows:
        names = re.findall(r"`([^`]+)`", keys)
        values = default.split(", ") if len(names) > 1 else [default]
        documented |= dict(zip(names, values, strict=False))
        named |= set(names)
        assert {name.split("#")[0] for name in names} <= known, f"{names}: {meaning}"
    assert len(named) > 40
    settings = {key for key, value in configs["train"].items() if not isinstance(value, dict) and "$" not in str(value)}
    settings -= {"imports", "run", "loaded", "device"}
    assert settings <= named, f"not documented: {sorted(settings - named)}"
    for name in ("similarity", "transformation", "objective", "store", "dataset", "intensity"):
        assert documented[name] == f"`{configs['train'][name]}`", name
    for name in ("max_epochs", "val_interval", "batch_size", "iterations", "first_iterations", "rank", "noise"):
        assert documented[name].split(" ")[0] == str(configs["train"][name]), name
