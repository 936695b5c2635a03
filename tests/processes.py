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
"""``python -m module ...``, ``-c code`` and scripts in processes of their own that do not import torch and MONAI again.

Importing them takes five seconds of a core, and the suite runs some hundred commands. The standard library's fork
server imports them once; every command is then a fork of it, with its own current directory, environment, arguments
and output.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES = ["torch", "torch.distributed", "monai.bundle", "monai.transforms", "ignite.engine", "itk", "nibabel"]
_LIBRARIES += ["matplotlib.pyplot", "matplotlib.backends.backend_agg", "scipy.ndimage", "fire"]
_LIBRARIES += ["tensorboard", "torch.utils.tensorboard"]


def run_python(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments``, which start with ``-m``, ``-c`` or the file of a script, and wait for it.

    Raises:
        subprocess.TimeoutExpired: when it takes longer; it is killed.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/stdout", f"{folder}/stderr"]
        process = context.Process(target=_run, args=(list(arguments), str(cwd), variables, streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), timeout)
        stdout, stderr = (Path(stream).read_text(errors="replace") for stream in streams)
    return subprocess.CompletedProcess(list(arguments), process.exitcode or 0, stdout, stderr)


def _run(arguments: list[str], cwd: str, variables: dict[str, str], streams: list[str]) -> None:
    """What the interpreter does with its arguments, in the forked process."""
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # else every collection would look at, and copy, all that the server has imported
    sys.dont_write_bytecode = False  # else every command would compile the core anew
    start, *rest = arguments
    program = rest.pop(0) if start in ("-m", "-c") else start
    installed = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    first = cwd if start in ("-m", "-c") else os.path.dirname(os.path.abspath(program))
    sys.path[:] = [first, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    sys.argv = [start if start == "-c" else program, *rest]
    if start == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif start == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(program, run_name="__main__")
