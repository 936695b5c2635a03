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
"""The weights that ship are what ``metadata.json`` records of them, and reach what it says they reach."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from common.options import check_options
from tests import documents
from tests.bundles.commands import python, read_config, rows, succeed, weights
from tests.processes import run_python

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path.parent.name for path in (ROOT / "bundles").glob("*/configs"))
FILES = [(path.parts[-3], path.name) for path in sorted((ROOT / "bundles").glob("*/models/*.pt"))]
# The first measurement of each file that can be done anywhere; the others are of the same kind, or need real data.
MEASURED = [
    pytest.param(bundle, measurements[0], id=f"{bundle}-{name}")
    for bundle, name in FILES
    if (
        measurements := [
            one for one in read_config(bundle, ROOT, "metadata")["weights"][name]["metrics"] if "command" in one
        ]
    )
]
TEXTS = ("what", "data", "data_licence", "licence", "time", "date", "good_for", "not_known")


def record(bundle: str, name: str) -> dict[str, Any]:
    """What is recorded of a file."""
    found: dict[str, Any] = read_config(bundle, ROOT, "metadata")["weights"][name]
    return found


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_file_of_weights_has_a_record_and_nothing_else_lies_there(bundle: str) -> None:
    names = {path.name for path in (ROOT / "bundles" / bundle / "models").iterdir()}
    assert names == set(read_config(bundle, ROOT, "metadata")["weights"]) and "model.pt" in names


@pytest.mark.parametrize(("bundle", "name"), FILES)
def test_a_file_is_the_recorded_one_small_and_plain(bundle: str, name: str) -> None:
    path = ROOT / "bundles" / bundle / "models" / name
    assert path.stat().st_size < 25e6
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record(bundle, name)["sha256"]
    state = weights(path)
    assert type(state) is dict and all(type(key) is str for key in state)
    for key, value in state.items():
        assert type(value) is torch.Tensor and value.device.type == "cpu" and bool(value.isfinite().all()), key
        assert not key.startswith("module."), "of a wrapper"


@pytest.mark.parametrize(("bundle", "name"), FILES)
def test_a_record_says_how_the_weights_came_about(
    bundle: str, name: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record(bundle, name)
    assert all(isinstance(found[key], str) and len(found[key]) > 3 for key in TEXTS)
    assert isinstance(found["seed"], int) and found["metrics"]
    monkeypatch.chdir(repository)
    for command in found["commands"]:
        program, _, module, verb, *arguments = shlex.split(command)
        assert (program, module, verb) == ("python", "monai.bundle", "run")
        given = documents.options(arguments)
        for file in re.findall(r"[\w/]+\.json", given["config_file"]):
            assert file.startswith("bundles/") and Path(file).is_file()
        assert int(given.get("seed", read_config(bundle, repository, "train")["seed"])) == found["seed"]
        check_options(["monai/bundle/__main__.py", verb, *arguments])


@pytest.mark.parametrize(("bundle", "name"), FILES)
def test_numbers_from_the_documentation_stand_there(bundle: str, name: str) -> None:
    found = record(bundle, name)
    text = (ROOT / "bundles" / bundle / "docs/README.md").read_text()
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    assert f"models/{name}" in text
    for metric in found["metrics"]:
        assert ("command" in metric) != (metric.get("source") == "docs/README.md")
        if "source" in metric:
            assert set(metric["values"].values()) <= numbers, metric


@pytest.mark.parametrize(("bundle", "name"), FILES)
def test_the_licence_of_the_data_is_told(bundle: str, name: str) -> None:
    found = record(bundle, name)
    (line,) = [
        line
        for line in (ROOT / "bundles" / bundle / "docs/data_license.txt").read_text().splitlines()
        if line.startswith(f"models/{name}:")
    ]
    real = "Task04_Hippocampus" in found["data"]
    assert found["licence"] == ("CC-BY-SA-4.0" if real else "Apache-2.0")
    assert ("CC-BY-SA 4.0" in line) == real == (found["data_licence"] == "CC-BY-SA 4.0")
    assert ("hippocamp" in line.lower()) == real


@pytest.mark.parametrize("bundle", BUNDLES)
def test_each_file_loads_into_its_network_to_the_last_tensor(repository: Path, bundle: str) -> None:
    records = read_config(bundle, repository, "metadata")["weights"]
    places = {name: found["loads_into"] for name, found in records.items()}
    code = f"""
import json, sys
sys.path.insert(1, "bundles/{bundle}")
from pathlib import Path
from monai.bundle import ConfigParser
for name, wanted in json.loads({json.dumps(json.dumps(places))}).items():
    parser = ConfigParser()
    parser.read_config([f"bundles/{bundle}/configs/{{config}}.json" for config in wanted["configs"]])
    parser["spatial_dims"] = wanted["spatial_dims"]
    path = "bundles/{bundle}/models/" + name
    if wanted["configs"] == ["finetune"]:
        parser["pretrained"] = path
        parser.get_parsed_content("pretrained_encoder")
    else:
        default = Path(parser.get_parsed_content("checkpoint"))
        if default.resolve() != Path(path).resolve():
            assert name not in ("model.pt", "model_2d.pt"), "inference takes these by itself"
            parser.ref_resolver.reset()
            parser["checkpoint"] = path
            parser.parse(True)
        parser.get_parsed_content("weights")
    print("loaded", name)
"""
    assert [line.split()[1] for line in python(repository, code).splitlines() if line[:6] == "loaded"] == list(records)


def test_weights_of_another_network_are_refused(repository: Path) -> None:
    """So loading, in the test above, proves something."""
    code = """
import sys
sys.path.insert(1, "bundles/gradirn")
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("bundles/gradirn/configs/inference.json")
parser["spatial_dims"], parser["levels"] = 2, 2
parser.get_parsed_content("weights")
"""
    with pytest.raises(AssertionError, match="CheckpointError"):
        python(repository, code)


@pytest.mark.parametrize(("bundle", "metric"), MEASURED)
def test_the_recorded_measures_hold(
    bundle: str, metric: dict[str, Any], repository: Path, cache: Path, tmp_path: Path
) -> None:
    """What a reader gets who types the recorded command, on the embedded cohorts; to one unit of the last digit."""
    _, *arguments = shlex.split(metric["command"])
    succeed(run_python([*arguments, "--dataset_dir", str(cache), "--output_dir", str(tmp_path)], repository))
    found = {row["metric"]: float(row["mean"]) for row in rows(tmp_path / "summary.csv")}
    for key, value in metric["values"].items():
        assert found[key] == pytest.approx(value, abs=max(0.003, 0.01 * abs(value))), key


@pytest.mark.parametrize("bundle", BUNDLES)
def test_required_packages_are_those_that_are_installed_together(repository: Path, bundle: str) -> None:
    """Where two versions are pinned it is the one for the newer Python."""
    pinned = dict(
        re.match(r"([\w.-]+)==([\w.]+)", line).groups()  # type: ignore[union-attr]
        for line in (repository / "constraints.txt").read_text().splitlines()
        if "==" in line and 'python_version < "3.11"' not in line
    )
    metadata = read_config(bundle, repository, "metadata")
    required = metadata["required_packages_version"]
    named = {
        name: metadata[f"{key}_version"] for name, key in [("monai", "monai"), ("torch", "pytorch"), ("numpy",) * 2]
    }
    assert {**required, **named}.items() <= pinned.items()
    project = (repository / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    assert {*required, *named} == set(re.findall(r'"([\w-]+)>', project))
