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

CONFIGS = "bundles/gradirn/configs"
read = partial(read_config, "gradirn")


@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("inference", "infer")])
def test_monai_finds_every_property_it_asks_for(repository: Path, name: str, kind: str, tmp_path: Path) -> None:
    assert "missing: []" in missing_properties("gradirn", repository, name, kind, tmp_path)


def test_published_settings_have_the_published_number_of_parameters(repository: Path) -> None:
    code = f"""
import sys
sys.path.insert(1, "bundles/gradirn")
from monai.bundle import ConfigParser
for overlays in (["paper_ukbb"], ["paper_mnms"], ["paper_camcan"], ["paper_ukbb", "vm"], ["paper_camcan", "vm"]):
    parser = ConfigParser()
    parser.read_config([f"{CONFIGS}/{{name}}.json" for name in ("train", *overlays)])
    network = parser.get_parsed_content("network_def")
    print(sum(p.numel() for p in network.parameters()), parser.get_parsed_content("smoothness_weight"))
"""
    counts = [line.split() for line in python(repository, code).splitlines()[-5:]]
    assert [int(count) for count, _ in counts] == [88521, 88521, 269964, 106866, 320419]
    assert {weight for _, weight in counts} == {"0.01"}


@pytest.mark.parametrize(("similarity", "weight"), [("ssd", 0.01), ("ncc", 0.1), ("lncc", 0.1)])
def test_the_loss_goes_with_the_similarity_as_published(repository: Path, similarity: str, weight: float) -> None:
    code = f"""
import sys, torch
sys.path.insert(1, "bundles/gradirn")
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("{CONFIGS}/train.json")
parser["similarity"] = "{similarity}"
loss = parser.get_parsed_content("loss")
x = torch.rand(1, 1, 12, 12)
total, terms = loss({{"moved": x, "fixed": 1 - x, "ddf": torch.arange(32.0).view(1, 2, 4, 4)}})
print(type(loss.terms["similarity"]).__name__, loss.weights["smoothness"], float(terms["smoothness"]), sorted(terms))
"""
    name, found, energy, terms = python(repository, code).splitlines()[-1].split(maxsplit=3)
    assert name == {"ssd": "MSE", "ncc": "GlobalNCC", "lncc": "LNCC"}[similarity]
    assert float(found) == weight and float(energy) == 25.5
    assert terms == "['similarity', 'smoothness']", "deep supervision is off unless asked for"


def test_overlays_change_only_what_the_config_has(repository: Path) -> None:
    train = read(repository, "train")
    for name in ("paper_ukbb", "paper_mnms", "paper_camcan", "vm"):
        assert {key.split("#")[0] for key in read(repository, name)} <= set(train), name


def test_the_options_in_the_documentation_are_keys_with_these_defaults(repository: Path) -> None:
    text = (repository / "bundles/gradirn/docs/README.md").read_text()
    text = text.split("### Options")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| `")]
    configs = {name: read(repository, name) for name in ("train", "evaluate", "inference")}
    known = {key for config in configs.values() for key in config}
    documented = {}
    for keys, meaning, default in rows:
        names = re.findall(r"`([^`]+)`", keys)
        values = default.split(", ") if len(names) > 1 else [default]
        documented |= dict(zip(names, values, strict=False))
        assert {name.split("#")[0] for name in names} <= known, f"{names}: {meaning}"
    assert len(documented) > 25
    train, evaluate = configs["train"], configs["evaluate"]
    for name in ("similarity", "dataset", "split"):
        assert documented[name] == f"`{(train | evaluate)[name]}`"
    for name in ("levels", "steps", "max_epochs", "epoch_length", "batch_size", "learning_rate", "val_interval"):
        assert documented[name] == str(train[name]), name
