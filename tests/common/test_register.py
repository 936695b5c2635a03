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
"""``python -m common register``: what it hands to MONAI, and what its help lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fire
import monai.bundle
import pytest

from common.register import command, register, register_help
from common.register_options import GROUPS

BUNDLES = ["dual_stream_pyramid", "gradirn", "similarity_learning", "spatially_varying_reg", "ssl_pretrain"]
NO_OPTIONS = {"imports", "bundle_root", "spatial_dims", "handlers", "run", "loaded"}


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What MONAI is called with; it does nothing."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(monai.bundle, "run", lambda **options: given.update(options))
    monkeypatch.setattr("sys.argv", ["common"])
    return given


def typed(*arguments: str) -> None:
    fire.Fire(register, command=list(arguments))


def test_options_reach_monai_as_they_were_typed(handed_over: dict[str, Any], repository: Path) -> None:
    typed("--moving", "a.nii", "--fixed", "b.nii", "--spacing", "[2,2,1]", "--refine", "5", "--affine", "none")
    config = str(repository / "bundles/dual_stream_pyramid/configs/inference.json")
    assert handed_over == {
        "config_file": config,
        "moving": "a.nii",
        "fixed": "b.nii",
        "output_dir": "registered",
        "spacing": [2, 2, 1],
        "refine": 5,
        "affine": "none",
    }


def test_names_of_files_are_no_numbers_lists_or_comments(handed_over: dict[str, Any]) -> None:
    typed("--moving", "1e3", "--fixed", "(a,b)", "--output_dir", "20_24", "--moving_label", "x#1", "--pairs", "7")
    names = {key: handed_over[key] for key in ("moving", "fixed", "output_dir", "moving_label", "pairs")}
    assert list(names.values()) == ["1e3", "(a,b)", "20_24", "x#1", "7"]


def test_files_that_are_called_like_expressions_are_files(
    handed_over: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$a.nii").touch()
    typed("--moving", "$a.nii", "--fixed", "@moving", "--bundle", "gradirn")
    assert (handed_over["moving"], handed_over["fixed"]) == ("./$a.nii", "@moving")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bundle": "voxelmorph"}, "--bundle voxelmorph: there is none of this name; expected one of dual_stream_p"),
        ({"bundel": "gradirn"}, "--bundel is no option of register: did you mean --bundle"),
        ({"stacks": True}, "--stacks is no option of register"),
        ({"device": "gpu"}, "--device gpu is none that PyTorch knows"),
    ],
)
def test_what_there_is_not_is_refused_before_monai_starts(
    handed_over: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        register(**options)
    assert handed_over == {}


def test_options_of_a_bundle_of_monai_and_of_tracking_pass(handed_over: dict[str, Any]) -> None:
    register(bundle="gradirn", stacks=True, logging_file=False, **{"network_def#steps": 2})
    assert handed_over["network_def#steps"] == 2 and handed_over["stacks"] is True
    register(tracking="mlflow", experiment_name="mine")
    assert handed_over["experiment_name"] == "mine"


def test_the_long_form_can_be_typed(repository: Path) -> None:
    found = command("gradirn", moving="a b.nii", spacing=[2, 2])
    config = str(repository / "bundles/gradirn/configs/inference.json")
    assert found == ["run", "--config_file", config, "--moving", "a b.nii", "--spacing", "[2, 2]"]


@pytest.mark.parametrize("bundle", BUNDLES)
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_help_lists_every_option_with_its_meaning(repository: Path, bundle: str, form: str) -> None:
    text = register_help(form.format("--bundle", bundle).split())
    lines = text.splitlines()
    config = json.loads((repository / f"bundles/{bundle}/configs/inference.json").read_text())
    plain = {key: value for key, value in config.items() if not isinstance(value, dict) and key not in NO_OPTIONS}
    for key, value in plain.items():
        rows = [number for number, line in enumerate(lines) if line.split()[:1] == [f"--{key}"]]
        assert len(rows) == 1, f"{key} is listed {len(rows)} times"
        about = lines[rows[0]].partition(f"--{key}")[2].strip()
        assert len(about.split("[")[0]) > 6, f"--{key} has no meaning: {about!r}"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            following = " ".join(lines[rows[0] : rows[0] + 3])
            assert f"[{value}]" in following, f"--{key} is {value}: {following}"
    assert f"[{bundle}]" in text and "[registered]" in text and "$" not in text
    assert max(map(len, lines)) <= 120


def test_meanings_are_of_options_that_some_bundle_has(repository: Path) -> None:
    known = {"bundle", "debug"}
    for bundle in BUNDLES:
        known |= set(json.loads((repository / f"bundles/{bundle}/configs/inference.json").read_text()))
    assert {name for group in GROUPS.values() for name in group} <= known
