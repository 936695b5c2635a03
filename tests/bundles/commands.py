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
"""What the tests of every bundle do: type a command, and look at what it leaves."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.processes import run_python


def run_bundle(
    bundle: str, repository: Path, *configs: str, torchrun: bool = False, **overrides: Any
) -> subprocess.CompletedProcess[str]:
    """``python -m monai.bundle run`` on configs of a bundle, on one process or on two."""
    files = [f"bundles/{bundle}/configs/{name}.json" for name in configs]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"] if torchrun else []
    command = ["-m", *launcher, "monai.bundle", "run", "--config_file", files[0] if len(files) == 1 else str(files)]
    for key, value in overrides.items():
        command += [f"--{key}", str(value)]
    return run_python(command, repository)


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """All that a command printed, if it came to its end."""
    text = result.stdout + result.stderr
    assert result.returncode == 0, text[-4000:]
    return text


def python(repository: Path, code: str) -> str:
    """Run in a process of its own, since ``scripts`` means another package in each bundle."""
    result = run_python(["-c", code], repository)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict."""
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


def rows(path: Path) -> list[dict[str, str]]:
    """A table."""
    with open(path) as file:
        return list(csv.DictReader(file))


def mean(folder: Path, column: str) -> float:
    """The mean of a column of ``metrics.csv`` in a folder."""
    values = [float(row[column]) for row in rows(folder / "metrics.csv")]
    return sum(values) / len(values)


def read_config(bundle: str, repository: Path, name: str) -> dict[str, Any]:
    """A config as it stands."""
    content: dict[str, Any] = json.loads((repository / f"bundles/{bundle}/configs/{name}.json").read_text())
    return content


def strings(value: object) -> list[str]:
    """Every string in a config."""
    if isinstance(value, dict):
        return [text for part in value.values() for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def missing_properties(bundle: str, repository: Path, name: str, kind: str, folder: Path) -> str:
    """What MONAI misses of the properties that a workflow of this kind should have; it is built, not run."""
    code = f"""
import sys
sys.path.insert(1, "bundles/{bundle}")
from monai.bundle import ConfigWorkflow
workflow = ConfigWorkflow(
    "bundles/{bundle}/configs/{name}.json", workflow_type="{kind}", logging_file=False,
    output_dir={str(folder / "out")!r}, dataset_dir={str(folder / "data")!r}
)
workflow.initialize()
print("missing:", workflow.check_properties())
"""
    return python(repository, code)
