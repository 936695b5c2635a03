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
"""A Python that has the libraries of this one and nothing of the checkout, as somebody has who downloads a zip."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

# Each process of the environment writes at its end which files its `common` and `scripts` came from.
_RECORD = """
import atexit, json, os, sys

def record():
    found = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    ours = {name: file for name, file in found.items() if name.split(".")[0] in ("common", "scripts")}
    with open(os.environ["WARPZOO_RECORD"], "w") as file:
        json.dump(ours, file)

if "WARPZOO_RECORD" in os.environ:
    atexit.register(record)
"""

# Imports the libraries once; every line of input is then a command for a fork of it.
_SERVER = """
import atexit, json, os, runpy, sys, traceback
import torch, monai.bundle, monai.transforms, ignite.engine, itk, nibabel, matplotlib.pyplot, torch.utils.tensorboard
import sitecustomize

def run(arguments, cwd, variables, streams):
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(variables)
    sys.path[0] = cwd
    sys.argv = arguments
    atexit.register(sitecustomize.record)
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = run(**json.loads(line))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class CleanEnvironment:
    """A virtual environment without the checkout.

    Args:
        folder: of the environment and of the files it caches.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv/bin/python"
        purelib = subprocess.run(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        # A folder that a .pth file names is searched, but its own .pth files, the editable install's, are not read.
        libraries = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
        Path(purelib, "libraries.pth").write_text("\n".join(sorted(libraries)))
        Path(purelib, "sitecustomize.py").write_text(_RECORD)
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        # The caches are its own, so that nothing is there from earlier runs.
        self.variables = {**kept, "OMP_NUM_THREADS": "1", "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
        self.folder = folder
        self._record = folder / "record.json"
        self._server: subprocess.Popen[str] | None = None

    def run(self, arguments: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
        """``python arguments`` in a new interpreter."""
        variables = {**self.variables, "WARPZOO_RECORD": str(self._record)}
        self._record.unlink(missing_ok=True)
        command = [str(self.python), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600)

    def fork(self, arguments: Sequence[object], cwd: Path) -> subprocess.CompletedProcess[str]:
        """``python -m arguments`` in a fork of one interpreter of the environment that has the libraries loaded."""
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._server = subprocess.Popen([self.python, "-c", _SERVER], cwd=self.folder, env=self.variables, **pipes)  # type: ignore[call-overload]
        assert self._server is not None and self._server.stdin and self._server.stdout
        streams = [str(self.folder / name) for name in ("stdout", "stderr")]
        for stream in [*streams, self._record]:
            Path(stream).unlink(missing_ok=True)
        variables = {"WARPZOO_RECORD": str(self._record)}
        command = {"arguments": [str(each) for each in arguments], "cwd": str(cwd), "variables": variables}
        self._server.stdin.write(json.dumps({**command, "streams": streams}) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        stdout, stderr = (Path(stream).read_text(errors="replace") for stream in streams)
        return subprocess.CompletedProcess([str(each) for each in arguments], code, stdout, stderr)

    def loaded(self) -> dict[str, str]:
        """The file of every module of ``common`` and ``scripts`` that the last process had loaded."""
        modules: dict[str, str] = json.loads(self._record.read_text())
        return modules

    def close(self) -> None:
        """End the interpreter that forks come from."""
        if self._server is not None:
            self._server.communicate()
