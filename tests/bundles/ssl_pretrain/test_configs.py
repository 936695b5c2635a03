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
from pathlib import Path

import pytest

from tests.bundles.commands import python, read_config

CONFIGS = "bundles/ssl_pretrain/configs"


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("train", "train", "spatial_size=[16, 16, 16]"),
        ("finetune", "train", "dataset_dir=DATA, spatial_size=[16, 16, 16]"),
        ("inference", "infer", "dataset_dir=DATA"),
    ],
)
def test_monai_finds_every_property_it_asks_for(
    repository: Path, name: str, kind: str, options: str, tmp_path: Path
) -> None:
    code = f"""
import sys
DATA, OUT = {str(tmp_path / "data")!r}, {str(tmp_path / "out")!r}
sys.path.insert(1, "bundles/ssl_pretrain")
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow(
    "{CONFIGS}/{name}.json", workflow_type="{kind}", logging_file=False, output_dir=OUT, {options}
)
workflow.initialize()
print("missing:", workflow.check_properties())
"""
    assert "missing: []" in python(repository, code)


def test_published_settings_have_the_published_number_of_parameters(repository: Path) -> None:
    code = f"""
import sys
sys.path.insert(1, "bundles/ssl_pretrain")
from monai.bundle import ConfigParser
for job in ("train", "finetune"):
    overlay = "paper_ixi_pretrain" if job == "train" else "paper_ixi"
    parser = ConfigParser()
    parser.read_config([f"{CONFIGS}/{{job}}.json", f"{CONFIGS}/{{overlay}}.json"])
    network = parser.get_parsed_content("network_def")
    print(sum(p.numel() for p in network.encoder.parameters()), sum(p.numel() for p in network.parameters()))
"""
    pretrain, finetune = python(repository, code).splitlines()[-2:]
    assert pretrain.split() == ["11853528", str(11853528 + 321528)]
    assert finetune.split()[0] == "11853528"


def test_the_options_in_the_documentation_are_keys_with_these_defaults(repository: Path) -> None:
    text = (repository / "bundles/ssl_pretrain/docs/README.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| `")]
    configs = {name: read_config("ssl_pretrain", repository, name) for name in ("train", "finetune")}
    known = {name.split("#")[0] for config in configs.values() for name in config}
    named = [name for keys, _, _ in rows for name in re.findall(r"`([^`]+)`", keys)]
    assert len(named) > 20
    assert {name.split("#")[0] for name in named} <= known
    defaults = {keys.strip(): default.strip() for keys, meaning, default in rows if "pretraining" not in meaning}
    finetune = configs["finetune"]
    sizes = [finetune[name] for name in ("max_epochs", "epoch_length", "batch_size")]
    assert defaults["`max_epochs`, `epoch_length`, `batch_size`"] == ", ".join(map(str, sizes))
    assert defaults["`encoder`"] == f"`{finetune['encoder']}`" and defaults["`preset`"] == f"`{finetune['preset']}`"
