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
"""Run a script on two processes that talk to each other over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.processes import run_python


def run_on_two_ranks(script: str, folder: Path, repository: Path) -> list[str]:
    """Start ``python -c script folder rank`` for ranks 0 and 1, which have to succeed; what each wrote to stderr."""
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-c", script, str(folder)]
    processes = [
        subprocess.Popen([*arguments, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return errors


def fork_two_ranks(*arguments: Sequence[str], repository: Path) -> list[str]:
    """``python arguments`` as ranks 0 and 1, forks with the variables that torchrun sets; what each prints.

    Args:
        arguments: of both, or of rank 0 and of rank 1.
        repository: the current directory.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def start(rank: int) -> subprocess.CompletedProcess[str]:
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return run_python(arguments[rank % len(arguments)], repository, variables)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, (0, 1)))
    texts = [each.stdout + each.stderr for each in done]
    assert [each.returncode for each in done] == [0, 0], "\n".join(text[-4000:] for text in texts)
    return texts
