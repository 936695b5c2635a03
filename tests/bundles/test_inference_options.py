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
"""The options of registering two scans are the same in every bundle, and are those that docs/inference.md lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.bundles.commands import read_config

BUNDLES = sorted(path.name for path in (Path(__file__).parents[2] / "bundles").iterdir())


def documented(repository: Path) -> dict[str, str]:
    """The options of the table, with their defaults as it writes them."""
    text = (repository / "docs/inference.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.split("## Options")[1].splitlines() if line.startswith("| `")]
    found: dict[str, str] = {}
    for keys, _, default in rows:
        names = re.findall(r"`([^`]+)`", keys)
        values = [part.strip() for part in default.rstrip(" |").split(", ")]
        one_each = len(values) == len(names) and not default.startswith("`[")
        found |= dict(zip(names, values, strict=True)) if one_each else dict.fromkeys(names, default.rstrip(" |"))
    return found


def options(config: dict[str, Any]) -> dict[str, Any]:
    """What comes before the first component: the keys that a user sets."""
    keys = list(config)
    return {key: config[key] for key in keys[: keys.index("listed")] if key not in ("imports", "bundle_root")}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_table_has_the_defaults_of_every_bundle(repository: Path, bundle: str) -> None:
    own, table = options(read_config(bundle, repository, "inference")), documented(repository)
    for key, default in table.items():
        value = own[key]
        if default.startswith("`") and key != "output_dir":
            assert json.loads(json.dumps(value)) == _read(default.strip("`")), key
        else:
            assert value is None or isinstance(value, str), (key, value)
    assert own["output_dir"] == f"runs/{bundle}/registration"


def test_the_table_has_every_option_that_all_bundles_have(repository: Path) -> None:
    common = set.intersection(*(set(options(read_config(bundle, repository, "inference"))) for bundle in BUNDLES))
    assert set(documented(repository)) == common


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
