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
from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from common.options import check_options

RUN = ["/somewhere/monai/bundle/__main__.py", "run"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    content = {"bundle_root": ".", "max_epochs": 4, "amp": False, "dataset": "none", "train": {"trainer": {}}}
    path.write_text(json.dumps(content))
    return path


def test_a_misspelt_option_is_named_with_the_one_that_was_meant(config: Path) -> None:
    with pytest.raises(ValueError, match=r"--max_epoch is no key of .*train.json: did you mean --max_epochs\?"):
        check_options([*RUN, "--config_file", str(config), "--max_epoch", "3"])
    with pytest.raises(ValueError, match=r"--zzz is no key .* amp, bundle_root, dataset, max_epochs, train"):
        check_options([*RUN, f"--config_file={config}", "--zzz=3"])
    with pytest.raises(ValueError, match=r"--trian#trainer#amp .* did you mean --train"):
        check_options([*RUN, "--config_file", str(config), "--trian#trainer#amp", "3"])


def test_keys_of_the_config_and_options_of_monai_pass(config: Path) -> None:
    overlay = config.with_name("overlay.json")
    overlay.write_text(json.dumps({"train#trainer#amp": True, "initialize": []}))
    both = str([str(config), str(overlay)])
    given = ["--max-epochs", "-1", "--train::trainer::amp", "True", "--initialize", "[]", "-amp", "bf16"]
    own = ["--run_id", "run", "--logging_file", "False", "--workflow_type", "train", "--bundle_root", "."]
    check_options([*RUN, "--config_file", both, *given, *own, "--", "--trace"])
    with pytest.raises(ValueError, match="--initialize is no key"):
        check_options([*RUN, "--config_file", str(config), "--initialize", "[]"])


def test_options_of_tracking_pass_with_tracking_only(config: Path, tmp_path: Path) -> None:
    named = [*RUN, "--config_file", str(config), "--experiment_name", "mine"]
    check_options([*named, "--tracking", "mlflow", "--tracking_uri", "sqlite:///x.db", "--run_name", "first"])
    with pytest.raises(ValueError, match="--experiment_name is no key"):
        check_options(named)
    with pytest.raises(ValueError, match="--evaluator is no key"):
        check_options([*named, "--tracking", "mlflow", "--evaluator", "1"])
    settings = tmp_path / "mine.json"
    settings.write_text(json.dumps({"handlers_id": {}, "configs": {"experiment_name": "x", "colour": "red"}}))
    check_options([*named, "--tracking", str(settings), "--colour", "blue"])


def test_tracking_without_mlflow_says_what_to_install(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else there(name))
    with pytest.raises(ModuleNotFoundError, match=r'pip install "warpzoo\[track\]"'):
        check_options([*RUN, "--config_file", str(config), "--tracking", "mlflow"])


def test_keys_of_other_formats_are_not_guessed(config: Path) -> None:
    both = str([str(config), "overlay.yaml"])
    check_options([*RUN, "--config_file", both, "--anything", "1"])


def test_what_is_there_for_monai_only_is_refused(config: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset has no effect in .*train.json"):
        check_options([*RUN, "--config_file", str(config), "--dataset", "oasis"], without_effect=["dataset"])


def test_other_programs_may_have_any_options() -> None:
    check_options(["/usr/bin/pytest", "--max_epoch", "3"])
    check_options(["/somewhere/monai/bundle/__main__.py", "verify_metadata", "--max_epoch", "3"])
