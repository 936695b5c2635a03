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

from tests.bundles.commands import python, read_config

CONFIGS = "bundles/dual_stream_pyramid/configs"
config = partial(read_config, "dual_stream_pyramid")


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("train", "train", "dataset_dir=DATA, spatial_size=[16, 16, 16]"),
        ("inference", "infer", "dataset_dir=DATA"),
    ],
)
def test_monai_finds_every_property_it_asks_for(
    repository: Path, name: str, kind: str, options: str, tmp_path: Path
) -> None:
    code = f"""
import sys
DATA, OUT = {str(tmp_path / "data")!r}, {str(tmp_path / "out")!r}
sys.path.insert(1, "bundles/dual_stream_pyramid")
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow(
    "{CONFIGS}/{name}.json", workflow_type="{kind}", logging_file=False, output_dir=OUT, {options}
)
workflow.initialize()
print("missing:", workflow.check_properties())
"""
    assert "missing: []" in python(repository, code)


@pytest.mark.parametrize("dataset", ["lumir", "oasis", "abdomen_ct"])
def test_published_settings(repository: Path, dataset: str) -> None:
    code = f"""
import sys
sys.path.insert(1, "bundles/dual_stream_pyramid")
from monai.bundle import ConfigParser
for decoder in ("conv_c", "convic_c"):
    parser = ConfigParser()
    parser.read_config(["{CONFIGS}/train.json", "{CONFIGS}/paper_{dataset}.json"])
    parser["decoder"] = decoder
    parser["train#dataloader"] = list(range(parser.get_parsed_content("epoch_length")))
    network, scheduler = parser.get_parsed_content("network_def"), parser.get_parsed_content("lr_scheduler")
    loss, optimizer = parser.get_parsed_content("loss"), parser.get_parsed_content("optimizer")
    group = optimizer.param_groups[0]
    print(sum(p.numel() for p in network.parameters()), scheduler.T_0, scheduler.T_mult, scheduler.eta_min)
    print(group["amsgrad"], group["initial_lr"], {{k: v for k, v in loss.weights.items() if v}})
"""
    lines = python(repository, code).splitlines()[-4:]
    both = "'similarity': 0.5, 'inverse_similarity': 0.5, 'smoothness': 0.5, 'inverse_smoothness': 0.5"
    # 100 directed pairs an epoch: one a step, or two for a decoder that gives both fields; restarts from epoch 100.
    assert lines == [
        "1993023 10000 2 1e-05",
        "True 0.001 {'similarity': 1.0, 'smoothness': 1.0}",
        "2307519 5000 2 1e-05",
        f"True 0.001 {{{both}}}",
    ]


def test_the_options_in_the_documentation_are_keys_with_these_defaults(repository: Path) -> None:
    text = (repository / "bundles/dual_stream_pyramid/docs/README.md").read_text()
    table = text.split("### Options")[1].split("\n\n")[1]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| `")]
    train = config(repository, "train")
    known = {key for name in ("train", "evaluate", "random_images", "greedy") for key in config(repository, name)}
    checked = 0
    for keys, _, defaults in rows:
        names = re.findall(r"`([^`]+)`", keys)
        assert {name.split("#")[0] for name in names} <= known, names
        values = [value.strip(" `") for value in defaults.split(",")]
        for name, value in zip(names, values, strict=False):
            if len(names) == len(values) and isinstance(train.get(name), (int, float, str)):
                assert value == str(train[name]).lower() or str(train[name]).startswith(("$", "@")), (name, value)
                checked += 1
    assert checked > 8
