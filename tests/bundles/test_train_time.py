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
"""``train.json`` as it stands ends offline within the minutes that ``metadata.json`` promises.

``train_minutes`` are minutes of one core: on two it takes less. A whole run of all five takes eight of them, which the
suite cannot spend. So each trains the few steps that are named here and validates once; what a step and a validation
take is multiplied by how many of them ``train.json`` asks for. Nothing else is changed, and no socket connects.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bundles.commands import read_config, rows, succeed
from tests.processes import run_python

_PROGRAM = """
import json, runpy, socket, sys, time


def refuse(*arguments, **options):
    raise OSError(f"this run is offline, and asked for {arguments[1:] or arguments}")


socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from monai.engines import Evaluator, Workflow
run, spent = Workflow.run, {}


def timed(self):
    start = time.process_time()
    run(self)
    name = "validation" if isinstance(self, Evaluator) else "training"
    spent.setdefault(name, []).append(time.process_time() - start)


Workflow.run = timed
start = time.process_time()
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
print(json.dumps({"total": time.process_time() - start, **spent}))
"""


@dataclass(frozen=True)
class Part:
    """What is run of a ``train.json``: one epoch of ``steps``, by ``options``, where the whole has ``all_steps``."""

    steps: int
    all_steps: int
    options: tuple[str, ...]


# Of `similarity_learning` an epoch is a step. A pair's first visit, left out here, takes four times its later ones.
PARTS = {
    "dual_stream_pyramid": Part(4, 4 * 25, ("--epoch_length", "4")),
    "gradirn": Part(20, 8 * 40, ("--epoch_length", "20")),
    "similarity_learning": Part(1, 4 + 11, ("--first_iterations", "64")),
    "spatially_varying_reg": Part(20, 8 * 40, ("--epoch_length", "20")),
    "ssl_pretrain": Part(20, 4 * 60, ("--pairs_per_epoch", "20")),
}


@pytest.mark.parametrize("bundle", PARTS)
def test_training_ends_offline_within_its_promised_minutes(repository: Path, bundle: str, tmp_path: Path) -> None:
    part = PARTS[bundle]
    config = read_config(bundle, repository, "train")
    arguments = ["run", "--config_file", f"bundles/{bundle}/configs/train.json", "--output_dir", str(tmp_path / "out")]
    arguments += ["--max_epochs", "1", "--val_interval", "1", *part.options]
    text = succeed(run_python(["-c", _PROGRAM, *arguments], repository, {"XDG_CACHE_HOME": str(tmp_path)}))
    spent = json.loads(next(line for line in text.splitlines() if line.startswith('{"total"')))
    (training,), (validation,) = spent["training"], spent["validation"]
    steps = (training - validation) * part.all_steps / part.steps
    seconds = spent["total"] - training + steps + validation * (config["max_epochs"] // config["val_interval"])
    promised = read_config(bundle, repository, "metadata")["train_minutes"]
    assert seconds < 60 * promised, f"{seconds:.0f} CPU-seconds"
    assert (tmp_path / "out/model.pt").is_file() and rows(tmp_path / "out/metrics.csv")
