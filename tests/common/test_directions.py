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
"""The page on directions: its example is run, and its numbers are those that come out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from common.apply import apply
from common.command_line import function_help
from common.io import load_image
from tests import documents
from tests.bundles.commands import succeed
from tests.processes import run_python

PAGE = (Path(__file__).resolve().parents[2] / "docs/directions.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(ras|lps|voxel)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE)


def numbers(cell: str) -> list[float]:
    return [float(number) for number in cell.split(",")]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder in which the page's commands were typed."""
    folder = tmp_path_factory.mktemp("example")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    succeed(run_python(["-c", code], folder))
    (block,) = documents.blocks(PAGE)
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "python"
        succeed(run_python(arguments, folder, {"PYTHONPATH": str(repository)}))
    return folder


def test_the_diagram_is_that_of_the_help() -> None:
    (diagram,) = re.findall(r"```\n( .*?)```", PAGE, re.DOTALL)
    assert diagram in function_help(apply, "apply")


def test_the_commands_do_what_the_page_says(example: Path) -> None:
    moved, moving = (load_image(example / f"{name}.nii.gz").array for name in ("moved", "moving"))
    assert moved[2, 2, 1] == moving[4, 4, 2]
    partner = (example / "partner.csv").read_text().splitlines()
    (in_ras,) = (row for row in ROWS if row[0] == "ras")
    assert partner[0] == "x,y,z" and np.allclose(numbers(partner[1]), numbers(in_ras[2]), atol=1e-3)


@pytest.mark.parametrize(("space", "point", "of_fixed", "of_moving"), ROWS, ids=[row[0] for row in ROWS])
def test_the_table_is_right(
    example: Path, tmp_path: Path, space: str, point: str, of_fixed: str, of_moving: str
) -> None:
    written = (example / f"{space}.csv").read_text().splitlines()[1]
    assert numbers(written) == numbers(point)
    images = {name: str(example / f"{name}.nii.gz") for name in ("moving", "fixed")}
    for of, partner in (("fixed", of_fixed), ("moving", of_moving)):
        table, out = str(example / f"{space}.csv"), tmp_path / "out.csv"
        apply(str(example / "shift.tfm"), str(out), points=table, space=space, of=of, **images)
        assert np.allclose(numbers(out.read_text().splitlines()[1]), numbers(partner), atol=1e-3)


def test_all_spaces_are_in_the_table() -> None:
    assert [row[0] for row in ROWS] == ["ras", "lps", "voxel"]
