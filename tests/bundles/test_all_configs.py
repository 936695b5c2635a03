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
"""What holds for the configs of every bundle, each file for itself and every combination that is offered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import config_rules
from tests.bundles.commands import python, read_config

BUNDLES = sorted(path.parent.name for path in (Path(__file__).parents[2] / "bundles").glob("*/configs"))
FILES = [
    (bundle, path.stem)
    for bundle in BUNDLES
    for path in sorted((Path(__file__).parents[2] / "bundles" / bundle / "configs").glob("*.json"))
]
CONFIGS = [(bundle, name) for bundle, name in FILES if name != "metadata"]

# What may follow what: for each job, the lists of overlays that the documentation offers.
PYRAMID_BASELINES = [["voxelmorph"], ["transmorph"], ["vfa"], ["sitreg"]]
SIMILARITY = [["lcc"], ["bspline"], ["lcc", "bspline"]]
SMOOTHNESS = [["gaussian"], ["uniform"], ["hyper"], ["hyper", "gaussian"]]
PAPER_SPR = ["paper_ixi", "paper_autopet", "paper_acdc", "paper_mnms"]
COMBINATIONS: dict[str, dict[str, list[list[str]]]] = {
    "dual_stream_pyramid": {
        "train": [
            *PYRAMID_BASELINES,
            *(["sitreg_v2"], ["random_images"], ["random_images", "multi_gpu_train"]),
            *(["paper_oasis"], ["paper_lumir"], ["paper_abdomen_ct"], ["paper_lumir", "sitreg"]),
        ],
        "evaluate": [*PYRAMID_BASELINES, ["greedy"]],
        "inference": [*PYRAMID_BASELINES, ["greedy"]],
    },
    "gradirn": {
        "train": [
            ["vm"],
            *([name, *rest] for name in ("paper_ukbb", "paper_mnms", "paper_camcan") for rest in ([], ["vm"])),
        ],
        "evaluate": [["vm"]],
        "inference": [["vm"]],
    },
    "similarity_learning": {
        "train": [*SIMILARITY, ["bound"], ["paper_ukbb"], ["paper_ukbb", "lcc", "bspline"]],
        "evaluate": [*SIMILARITY, ["vxm"], ["paper_ukbb"], ["paper_ukbb", "lcc", "bspline"]],
        "inference": [*SIMILARITY, ["vxm"]],
        "train_vxm": [["lcc"]],
    },
    "spatially_varying_reg": {
        "train": [*SMOOTHNESS, *([name, *rest] for name in PAPER_SPR for rest in ([], ["hyper"]))],
        "evaluate": [["hyper"], ["hyper", "gaussian"], ["gaussian"], ["uniform"]],
        "inference": [["hyper"], ["hyper", "gaussian"], ["gaussian"], ["uniform"]],
        "tune": [["gaussian"]],
    },
    "ssl_pretrain": {
        "train": [["paper_ixi_pretrain"]],
        "finetune": [["paper_ixi"]],
        "evaluate": [],
        "inference": [],
    },
}
TRAINING = ("train", "finetune", "train_vxm")
SCALED = {"train": "multi_gpu_train", "evaluate": "multi_gpu_evaluate"}

# The order of the keys that bundles share. Options of one bundle stand among them where they belong.
BEGINNING = "imports bundle_root output_dir device seed dataset dataset_dir datalist download"
SHARED_KEYS = {
    "train": f"{BEGINNING} atlas train_fraction train_count spatial_size spacing orientation intensity padding fit "
    "spatial_dims max_epochs epoch_length val_interval batch_size num_workers cache learning_rate amp resume "
    "pretrained checkpoint cohort labels subject_transform network_def network weights pretrained_encoder loss "
    "optimizer lr_scheduler state train validate checked_options seeded checked loaded run",
    "evaluate": f"{BEGINNING} atlas spatial_size spacing orientation intensity padding fit spatial_dims split "
    "batch_size checkpoint amp surface pictures cohort labels network_def evaluated_network weights preprocessing "
    "pairs dataloader inferer metrics handlers evaluator checked_options seeded loaded run",
}
SECTIONS = {
    "train": ["preprocessing", "dataset", "dataloader", "inferer", "handlers", "trainer"],
    "validate": ["preprocessing", "dataset", "dataloader", "inferer", "metrics", "key_metric", "handlers", "evaluator"],
}
REQUIRED = {
    "all": "output_dir device seed dataset dataset_dir network_def checkpoint amp checked_options seeded run",
    "train": "dataset datalist spatial_size loss optimizer max_epochs state resume train validate",
    "evaluate": "dataset datalist spatial_size split preprocessing dataloader metrics handlers evaluator weights",
    "inference": "moving fixed field_format dataset preprocessing dataloader inferer handlers evaluator weights",
}
# Pretraining starts from nothing. The similarity is learnt by a trainer whose objective is not a sum of terms.
WITHOUT = {("ssl_pretrain", "train"): {"checkpoint"}, ("similarity_learning", "train"): {"loss"}}


def merged(bundle: str, root: Path, *stems: str) -> dict[str, Any]:
    """What MONAI makes of a list of configs."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config([str(root / f"bundles/{bundle}/configs/{name}.json") for name in stems])
    content: dict[str, Any] = parser.get()
    return content


def jobs(bundle: str) -> list[tuple[str, ...]]:
    """Every list of configs that is offered: a job alone, with its overlays, and on several processes."""
    lists = [(job, *rest) for job, overlays in COMBINATIONS[bundle].items() for rest in [[], *overlays]]
    scaled = [
        (*names, SCALED["train" if names[0] in TRAINING else "evaluate"]) for names in lists if names[0] != "tune"
    ]
    return list(dict.fromkeys([*lists, *(names for names in scaled if len(set(names)) == len(names))]))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_fits_monais_schema_and_its_changelog(repository: Path, shared: Path, bundle: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    metadata = read_config(bundle, repository, "metadata")
    jsonschema.validate(metadata, json.loads((shared / "specs/meta_schema_20240725.retyped.json").read_text()))
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize(("bundle", "name"), FILES)
def test_a_file_has_no_key_twice_and_the_layout_of_the_others(repository: Path, bundle: str, name: str) -> None:
    text = (repository / f"bundles/{bundle}/configs/{name}.json").read_text()
    problems = config_rules.layout(text)
    if name == "metadata":  # sentences
        problems = [problem for problem in problems if "characters" not in problem]
    assert config_rules.duplicate_keys(text) + problems == []


@pytest.mark.parametrize(("bundle", "name"), CONFIGS)
def test_what_a_file_imports_exists_and_its_expressions_are_simple(repository: Path, bundle: str, name: str) -> None:
    config = read_config(bundle, repository, name)
    assert config_rules.imports(config) + config_rules.expression_rules(config) == []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_step_before_run_needs_the_bundle(repository: Path, bundle: str) -> None:
    for path in sorted((repository / "bundles" / bundle / "configs").glob("*.json")):
        config = json.loads(path.read_text())
        assert "initialize" not in config, path
        if "run" in config:
            assert config["run"][:3] == ["$@bundle_root", "$@checked_options", "$@seeded"], path


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_overlay_belongs_to_a_job(repository: Path, bundle: str) -> None:
    files = {name for owner, name in CONFIGS if owner == bundle}
    assert files == {name for names in jobs(bundle) for name in names}
    for job in COMBINATIONS[bundle]:
        assert "bundle_root" in read_config(bundle, repository, job), job


@pytest.mark.parametrize("bundle", BUNDLES)
def test_names_and_references_lead_somewhere_in_every_combination(repository: Path, bundle: str) -> None:
    for names in jobs(bundle):
        config = merged(bundle, repository, *names)
        roots = ["run", "finalize"] if len(names) > 1 else []
        assert config_rules.names(config) + config_rules.references(config, roots) == [], names


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_component_exists_and_takes_its_arguments(repository: Path, bundle: str) -> None:
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(1, "bundles/{bundle}")
from tests.bundles.config_rules import targets
from tests.bundles.test_all_configs import jobs, merged
found = {{"+".join(names): targets(merged("{bundle}", Path(), *names)) for names in jobs("{bundle}")}}
print(len(found), json.dumps({{names: problems for names, problems in found.items() if problems}}))
"""
    count, problems = python(repository, code).splitlines()[-1].split(maxsplit=1)
    assert int(count) == len(jobs(bundle)) > 5
    assert json.loads(problems) == {}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_keys_of_the_design_are_there_and_in_one_order(repository: Path, bundle: str) -> None:
    for job in COMBINATIONS[bundle]:
        config = read_config(bundle, repository, job)
        kind = "train" if job in TRAINING else "inference" if job == "inference" else "evaluate"
        required = set(REQUIRED["all"].split())
        if job != "tune":
            required |= set(REQUIRED[kind].split())
        assert required - WITHOUT.get((bundle, job), set()) <= set(config), job
        if kind != "inference":
            assert config_rules.order(config, SHARED_KEYS[kind].split()) == [], job
        if kind == "train":
            for section, parts in SECTIONS.items():
                assert [part for part in config[section] if part in parts] == parts, f"{job}: {section}"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_keys_of_the_design_mean_the_same(repository: Path, bundle: str) -> None:
    for job in COMBINATIONS[bundle]:
        config = read_config(bundle, repository, job)
        assert config["bundle_root"] == f"$common.bundle_root('{bundle}')"
        assert config["output_dir"].startswith(f"runs/{bundle}/")
        assert (config["seed"], config["amp"]) == (0, False)
        if job != "inference":
            assert isinstance(config["dataset"], str) and config["datalist"] is None
            assert len(config["spatial_size"]) in (2, 3)
            assert config["spatial_dims"] == "$len(@spatial_size)"
        if job in TRAINING:
            assert isinstance(config["max_epochs"], int)
            trainer = config["train"]["trainer"]
            assert (trainer["max_epochs"], trainer["train_handlers"]) == ("@max_epochs", "@train#handlers")
            assert config["optimizer"]["lr"] == "@learning_rate"
            assert config["state"]["model"] == "@network_def"
        if "checkpoint" in config:
            default = config["checkpoint"]
            assert default is None if job in TRAINING else default.startswith("$@bundle_root + ")


SAME = ["imports", "device", "seeded", "inferer", "network", "checked", "labels"]
SAME_IN_TRAINING = ["train#dataloader", "train#inferer", "validate#inferer", "weights"]


@pytest.mark.parametrize("key", [*SAME, *SAME_IN_TRAINING])
def test_a_block_that_bundles_share_is_the_same_in_all(repository: Path, key: str) -> None:
    found = {}
    for bundle in BUNDLES:
        for job in COMBINATIONS[bundle]:
            config = read_config(bundle, repository, job)
            section, _, part = key.rpartition("#")
            holder = config.get(section, {}) if section else config
            if part in holder and (key in SAME or job in TRAINING):
                found[f"{bundle}/{job}"] = json.dumps(holder[part])
    assert len(found) > 1 and len(set(found.values())) == 1, found


@pytest.mark.parametrize("bundle", BUNDLES)
def test_handlers_stand_in_one_order(repository: Path, bundle: str) -> None:
    """Validation before the checkpoint that wants its measure; tables and logs after what they report."""
    expected = {
        "train": ["ValidationHandler", "LrScheduleHandler", "LossProgressBar", "TensorBoardScalars", "SafeCheckpoint"],
        "validate": ["LossProgressBar", "MetricsTable", "TensorBoardScalars", "TensorBoardPictures", "PictureSaver"],
    }
    for job in set(COMBINATIONS[bundle]) & set(TRAINING):
        config = read_config(bundle, repository, job)
        for section, handlers in expected.items():
            found = [handler["_target_"].rpartition(".")[2] for handler in config[section]["handlers"]]
            assert [name for name in found if name in handlers] == handlers, f"{job}: {section}"
            for handler in config[section]["handlers"]:
                assert handler.get("log_dir", "@output_dir") == "@output_dir"
