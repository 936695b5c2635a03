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

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import greedy

SUMMARY = """metric,mean,std,median,min,max,count,nan
dice_before_1,0.4,0.1,0.4,0.3,0.5,7,0
dice_before_mean,0.5,0.1,0.5,0.3,0.5,7,0
dice_mean,0.8,0.1,0.8,0.7,0.9,7,0
hd95_mean,1.5,0.1,1.5,1,2,6,1
ndv,0.01,0,0.01,0.01,0.01,7,0
sdlogj,0.4,0,0.4,0.4,0.4,7,0
seconds,2.5,0.1,2.5,2,3,7,0
"""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Each evaluation's options; instead of running, it leaves a summary."""
    called: list[dict[str, str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        options = dict(zip(command[4::2], command[5::2], strict=True))
        called.append(options)
        folder = Path(options["--output_dir"])
        folder.mkdir(parents=True)
        (folder / "summary.csv").write_text(SUMMARY)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return called


def test_a_row_a_method(commands: list[dict[str, str]], tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    rows = greedy.measure(tmp_path, {"conv_c": checkpoint}, threads=2, dataset="hippocampus", spatial_size=[48, 64, 48])
    assert [row["method"] for row in rows] == ["Greedy", "Greedy, affine first", "conv_c"]
    assert rows[0] == {
        **{"method": "Greedy", "dice_before": 0.5, "dice": 0.8, "hd95": 1.5, "sdlogj": 0.4, "ndv": 0.01},
        **{"seconds": 2.5, "pairs": 7, "threads": 2},
    }
    assert len({options["--output_dir"] for options in commands}) == 3
    assert all(options["--spatial_size"] == "[48, 64, 48]" for options in commands)
    plain, affine, network = commands
    assert "greedy.json" in plain["--config_file"] and "--affine" not in plain and plain["--threads"] == "2"
    assert affine["--affine"] == "True"
    assert "greedy.json" not in network["--config_file"] and network["--checkpoint"] == str(checkpoint)


def test_options_are_keys_of_the_configs(commands: list[dict[str, str]], repository: Path, tmp_path: Path) -> None:
    from common.options import check_options

    greedy.measure(tmp_path, {"vfa": tmp_path / "model.pt"}, dataset="synthetic", spatial_size=[48, 48], split="test")
    for options in commands:
        arguments = [text for option in options.items() for text in option]
        files = [str(repository / name) for name in ast.literal_eval(options["--config_file"])]
        arguments[arguments.index("--config_file") + 1] = str(files)
        check_options(["/site-packages/monai/bundle/__main__.py", "run", *arguments])


def test_a_failed_evaluation_shows_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "no such cohort")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match=r"Greedy: [\s\S]*no such cohort"):
        greedy.evaluate("Greedy", tmp_path, ["greedy"], 1)
