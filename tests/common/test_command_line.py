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
"""What ends a command, and what its help says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.apply import apply
from common.command_line import (
    function_help,
    option_lines,
    reason_of,
    require_device,
    require_options,
    require_parameters,
)
from common.export import ExportError
from common.handlers.checkpoint import CheckpointError
from common.io import PairError, ScanError
from common.package import package
from tests.processes import run_python


def wrapped(error: Exception, *messages: str) -> Exception:
    """An error as it comes out of configs within configs."""
    for message in messages:
        outer = RuntimeError(message)
        outer.__cause__ = error
        error = outer
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ScanError("a.nii is cut off"), "a.nii is cut off"),
        (wrapped(PairError("a.nii is flat"), "Failed to instantiate x", "Failed to evaluate y"), "a.nii is flat"),
        (wrapped(CheckpointError("x.pt: other weights"), "Failed to evaluate y"), "x.pt: other weights"),
        (ExportError("it computes something else"), "it computes something else"),
        (FileNotFoundError("no image at a.nii"), "no image at a.nii"),
        (ModuleNotFoundError("needs MLflow"), "needs MLflow"),
        (ValueError("2 of 2 failed:\n  a: no image\n\n  b: flat"), "2 of 2 failed: a: no image b: flat"),
        (ValueError("my  file.nii"), "my  file.nii"),
        (ValueError(), "ValueError()"),
        (wrapped(RuntimeError("mat1 and mat2 differ"), "Failed to evaluate y"), None),
        (wrapped(KeyError("ddf"), "Failed to evaluate y"), None),
        (AssertionError(), None),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: Exception, reason: str | None) -> None:
    assert reason_of(error) == reason


def test_memory_that_is_not_there_is_no_riddle() -> None:
    error = wrapped(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Failed to evaluate y")
    reason = reason_of(error) or ""
    assert reason.startswith("not enough memory: CUDA out of memory") and "--spacing" in reason and "\n" not in reason
    assert "none is left" in (reason_of(MemoryError()) or "")


def test_options_are_compared_by_what_comes_before_a_mark() -> None:
    require_options(["affine", "network_def#steps", "network_def::steps"], ["affine", "network_def"], "register")
    with pytest.raises(
        ValueError, match=r"--afine is no option of register: did you mean --affine\? `python -m common"
    ):
        require_options(["afine"], ["affine", "refine"], "register")
    with pytest.raises(ValueError, match=r"--zzz#affine is no option of register: `python -m common register --help`"):
        require_options(["zzz#affine"], ["affine"], "register")


def test_parameters_of_a_function_are_options() -> None:
    given = ["--transform=a=b.h5", "--moving", "-1", "--fill", "-5", "--no-inverse", "-k", "label", "--noinverse"]
    require_parameters([word for word in given if word != "--no-inverse"], apply, "apply")
    with pytest.raises(ValueError, match=r"--movng is no option of apply: did you mean --moving\?"):
        require_parameters(["--transform", "a.h5", "--movng=b"], apply, "apply")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device {name}: PyTorch has no such GPU, it sees none .* or give cpu"):
        require_device(name)


def test_devices_that_are_there_pass() -> None:
    for name in (None, "", "cpu", "$torch.device('cuda')"):
        require_device(name)
    with pytest.raises(ValueError, match="--device gpu is none that PyTorch knows; expected cpu, cuda or cuda:1"):
        require_device("gpu")


def test_lists_of_options_show_defaults_as_they_are_typed() -> None:
    options: dict[str, tuple[str, Any]] = {
        "forms": ("what is written", ["itk", "l2r"]),
        "inverse": ("turn it around", False),
        "refine": ("iterations", 0),
        "an_option_with_a_name_that_is_long": ("that says much", None),
    }
    lines = [" ".join(line.split()) for line in option_lines(options).splitlines()]
    assert lines == [
        "--forms what is written ['itk','l2r']",
        "--inverse turn it around",
        "--refine iterations [0]",
        "--an_option_with_a_name_that_is_long that says much",
    ]
    assert max(map(len, option_lines({"x": ("word " * 60, 1)}).splitlines())) <= 110


def test_help_is_made_of_a_docstring() -> None:
    text = function_help(apply, "apply")
    words = " ".join(text.split())
    assert "    python -m common apply --transform transform.h5 --moving scan.nii.gz" in text
    assert "fixed image ----------------> moving image" in words and "``" not in text and "::" not in text
    assert "--transform needed: a file, or several as antsApplyTransforms takes them" in words
    assert "the frames keep adding up to 1). [image] --space of the points" in words
    assert "Raises" not in text and "TransformError" not in text
    assert "--output folder of the zips. [dist]" in " ".join(function_help(package, "package").split())


def test_commands_end_with_one_line_or_with_a_traceback(repository: Path, tmp_path: Path) -> None:
    command = ["-m", "common", "register", "--afine", "rigid"]
    result = run_python(command, tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: --afine is no option of register") and result.stderr.count("\n") == 1
    result = run_python([*command, "--debug"], tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: --afine" in result.stderr
    result = run_python(
        ["-m", "common", "apply", "--transform", "a.h5", "--points", "b.csv", "--output", "c.csv"],
        tmp_path,
        {"PYTHONPATH": str(repository)},
    )
    assert result.returncode == 1 and "a.h5" in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_no_input_explains_keeps_its_traceback(repository: Path, tmp_path: Path) -> None:
    code = "import sys, common.apply as m; m.apply = lambda: [][1]; sys.argv = ['common', 'apply']; "
    code += "from common.__main__ import main; main()"
    result = run_python(["-c", code], tmp_path, {"PYTHONPATH": str(repository)})
    assert result.returncode == 1 and "Traceback" in result.stderr and "IndexError" in result.stderr


def test_without_a_command_there_is_a_list_of_them(repository: Path, tmp_path: Path) -> None:
    for arguments, status in (([], 0), (["--help"], 0), (["regster"], 2)):
        result = run_python(["-m", "common", *arguments], tmp_path, {"PYTHONPATH": str(repository)})
        assert result.returncode == status and "``register`` two scans" in result.stdout
