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
"""The configs hold to MONAI's bundle properties, compose the loss that was published, and are what the text says."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.bundles.commands import missing_properties, python, read_config

BUNDLE = "spatially_varying_reg"
CONFIGS = f"bundles/{BUNDLE}/configs"
JOBS = ("train", "evaluate", "inference", "tune")
read = partial(read_config, BUNDLE)


@pytest.mark.parametrize(("name", "kind"), [("train", "train"), ("inference", "infer")])
def test_monai_finds_every_property_it_asks_for(repository: Path, name: str, kind: str, tmp_path: Path) -> None:
    assert "missing: []" in missing_properties(BUNDLE, repository, name, kind, tmp_path)


@pytest.fixture(scope="module")
def losses(repository: Path) -> dict[str, dict[str, Any]]:
    """The loss of each way to train, of a field that grows by 1 a voxel and weights of 1/2, in one process."""
    code = f"""
import json, sys, torch
sys.path.insert(1, "bundles/{BUNDLE}")
from monai.bundle import ConfigParser
x = torch.rand(2, 1, 12, 12)
field = torch.arange(12.0).view(12, 1).expand(2, 2, 12, 12).contiguous()
values = dict(moved=x, fixed=x, inverse_moved=x, moving=x, ddf=field, inverse_ddf=2 * field)
values |= dict(weight_map=torch.full((2, 1, 12, 12), 0.5))
values |= dict(alpha=torch.tensor([1.1, 1.3]), sigma=torch.tensor([0.2, 0.6]), w=torch.tensor([1.0, 3.0]))
cases = dict(plain=(), gaussian=("gaussian",), uniform=("uniform",), hyper=("hyper",))
cases |= dict(hyper_gaussian=("hyper", "gaussian"), both=())
found = {{}}
for name, overlays in cases.items():
    parser = ConfigParser()
    parser.read_config([f"{CONFIGS}/{{config}}.json" for config in ("train", *overlays)])
    parser["both_directions"] = name == "both"
    given = values if "hyper" in name else {{k: v for k, v in values.items() if k not in ("alpha", "sigma", "w")}}
    given = {{k: v for k, v in given.items() if k != "weight_map" or name != "uniform"}}
    loss = parser.get_parsed_content("loss")
    total, terms = loss(given)
    network = parser.get_parsed_content("network_def")
    found[name] = dict(
        terms={{key: float(value) for key, value in terms.items()}},
        weights={{key: value for key, value in loss.weights.items() if value}},
        network=type(network).__name__, inverse=network.inverse, weight_map=network.weight_map,
        names=list(network.conditioning.names) if "hyper" in name else [],
    )
print(json.dumps(found))
"""
    result: dict[str, dict[str, Any]] = json.loads(python(repository, code).splitlines()[-1])
    return result


# Squared differences are 1 along axis 0 and 0 along axis 1, so the diffusion energy is 1/2, and 1/4 with the weights.
@pytest.mark.parametrize(
    ("case", "smoothness", "prior"),
    [
        ("plain", 3.35 / 4, 0.05 * math.log(2)),
        ("gaussian", 3.35 / 4, 0.525 / 4),
        ("uniform", 3.35 / 2, None),
        ("hyper", (1 + 3) / 2 / 4, 0.2 * math.log(2)),
        ("hyper_gaussian", (1 + 3) / 2 / 4, 0.4 / 4),
        ("both", 3.35 / 4, 0.05 * math.log(2)),
    ],
)
def test_the_loss_is_the_published_one(
    losses: dict[str, dict[str, Any]], case: str, smoothness: float, prior: float | None
) -> None:
    terms = losses[case]["terms"]
    assert terms["smoothness"] == pytest.approx(smoothness, rel=1e-5) and terms["similarity"] < -0.9
    assert terms.get("prior") == (None if prior is None else pytest.approx(prior, rel=1e-5))
    if case != "both":
        assert set(losses[case]["weights"].values()) == {1.0}


def test_both_directions_count_half_each_and_the_prior_once(losses: dict[str, dict[str, Any]]) -> None:
    found = losses["both"]
    assert found["inverse"] and not losses["plain"]["inverse"]
    assert {name for name, weight in found["weights"].items() if weight == 0.5} == {
        "similarity",
        "inverse_similarity",
        "smoothness",
        "inverse_smoothness",
    }
    assert found["weights"]["prior"] == 1 and found["terms"]["inverse_smoothness"] == pytest.approx(3.35)


def test_overlays_choose_the_network(losses: dict[str, dict[str, Any]]) -> None:
    assert losses["plain"]["network"] == losses["uniform"]["network"] == "TransMorphSPR"
    assert losses["plain"]["weight_map"] and not losses["uniform"]["weight_map"]
    assert losses["hyper"]["names"] == ["alpha", "w"] and losses["hyper_gaussian"]["names"] == ["sigma", "w"]


def test_all_jobs_build_the_same_networks_by_default(repository: Path) -> None:
    configs = {name: read(repository, name) for name in JOBS}
    train, hyper = configs["train"], read(repository, "hyper")
    for name, config in configs.items():
        for key in ("channels", "embed_dim", "depths", "num_heads", "window_size", "steps", "downsample"):
            assert config[key] == train[key], (name, key)
    for name in ("evaluate", "inference"):
        assert configs[name]["network_def"] == train["network_def"]
    tune = configs["tune"]
    for key in ("prior", "alpha_range", "sigma_range", "w_range", "generator", "rank"):
        assert tune[key] == hyper[key], key
    asked = {key: value for key, value in hyper["network_def"].items() if key not in ("alpha", "sigma", "w", "inverse")}
    assert tune["network_def"] == asked


def test_overlays_change_only_what_the_config_has(repository: Path) -> None:
    train = set(read(repository, "train"))
    assert set(read(repository, "gaussian")) <= train and set(read(repository, "uniform")) <= train
    own = {"alpha_range", "sigma_range", "w_range", "generator", "rank"}
    assert set(read(repository, "hyper")) - train == own
    # A key with a path needs its parent, which not every job has.
    assert not [key for name in ("hyper", "gaussian", "uniform") for key in read(repository, name) if "#" in key]


def test_the_options_in_the_documentation_are_keys_with_these_defaults(repository: Path) -> None:
    text = (repository / f"bundles/{BUNDLE}/docs/README.md").read_text()
    text = text.split("### Options")[1].split("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| `")]
    configs = {name: read(repository, name) for name in (*JOBS, "hyper")}
    known = {key for config in configs.values() for key in config}
    documented = {}
    for keys, meaning, default in rows:
        names = re.findall(r"`([^`]+)`", keys)
        values = default.split("; ") if len(names) > 1 else [default]
        documented |= dict(zip(names, values, strict=False))
        assert {name.split("#")[0] for name in names} <= known, f"{names}: {meaning}"
    assert len(documented) > 40
    for name in ("dataset", "split", "prior", "weight_at", "generator", "method"):
        value = next(config[name] for config in configs.values() if name in config)
        assert documented[name] == f"`{value}`", name
    for name in ("alpha", "sigma", "w", "embed_dim", "depths", "num_heads", "window_size", "steps", "downsample"):
        assert documented[name].startswith(str(configs["train"][name])), name
    for name in ("max_epochs", "epoch_length", "batch_size", "learning_rate", "val_interval", "lncc_window"):
        assert documented[name] == str(configs["train"][name]), name
    for name in ("alpha_range", "sigma_range", "w_range", "rank"):
        assert documented[name] == str(configs["hyper"][name]), name
    for name in ("grid", "refinements", "evaluations", "early_fraction"):
        assert documented[name] == str(configs["tune"][name]), name
