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
"""What holds for the configs of every bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bundles.commands import read_config, strings

BUNDLES = sorted(path.parent.name for path in (Path(__file__).parents[2] / "bundles").glob("*/configs"))


@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_fits_monais_schema_and_its_changelog(repository: Path, shared: Path, bundle: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    metadata = read_config(bundle, repository, "metadata")
    jsonschema.validate(metadata, json.loads((shared / "specs/meta_schema_20240725.retyped.json").read_text()))
    assert metadata["version"] in metadata["changelog"]


@pytest.mark.parametrize("bundle", BUNDLES)
def test_no_step_before_run_touches_scripts_and_no_expression_is_long(repository: Path, bundle: str) -> None:
    for path in sorted((repository / "bundles" / bundle / "configs").glob("*.json")):
        config = json.loads(path.read_text())
        assert "scripts" not in json.dumps(config.get("initialize", ""))
        for text in strings(config):
            if text.startswith("$"):
                assert len(text) < 120 and "__" not in text and "subprocess" not in text, f"{path.name}: {text}"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_run_begins_with_the_root_of_its_bundle(repository: Path, bundle: str) -> None:
    for path in (repository / "bundles" / bundle / "configs").glob("*.json"):
        config = json.loads(path.read_text())
        if "run" in config:
            assert config["run"][0] == "$@bundle_root", path
