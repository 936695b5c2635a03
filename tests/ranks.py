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
import subprocess
import sys
from pathlib import Path


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
