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
"""Two processes that evaluate and train together."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_two_ranks

SCRIPT = """
import random, sys
import torch
import torch.distributed as dist
from ignite.engine import Engine

from common.handlers import LossProgressBar, MetricsTable, SafeCheckpoint, TensorBoardScalars
from common.handlers import load_checkpoint, resume_from
from common.metrics import DiceScore

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
label = torch.tensor([[[[1, 1, 0, 0]]]])
other = torch.tensor([[[[1, 0, 0, 0]]]])

# A rank without any item takes part; on the other there are rows.
metric = DiceScore([1, 2])
if rank == 1:
    metric(torch.cat([label, other]), torch.cat([label, label]))
assert metric.get_buffer().shape == (2, 2), metric.get_buffer()
assert abs(float(metric.aggregate()) - (1 + 2 / 3) / 2) < 1e-6
metric.reset()
assert metric.get_buffer() is None

# Five pairs dealt out in turn, the last place filled with the first pair again; only rank 1 sees labels.
pairs = [0, 2, 4] if rank == 0 else [1, 3, 0]

def evaluate(engine, pair):
    metrics = {"ndv": torch.tensor([[float(pair)]])}
    if rank == 1:
        metrics["dice"] = torch.tensor([[0.5, 1.0]])
    return {"moving_id": [f"m{pair}"], "fixed_id": ["f"], "metrics": metrics}

evaluator = Engine(evaluate)
MetricsTable(f"{folder}/table").attach(evaluator)
TensorBoardScalars(f"{folder}/events").attach(evaluator)
LossProgressBar("validate", terminal=True).attach(evaluator)
network = torch.nn.Linear(1, 1)
torch.manual_seed(10 + rank)
trainer = Engine(lambda engine, batch: {"loss": torch.rand(())})
trainer.state.max_epochs = 1
evaluator_for = Engine(lambda engine, batch: {"metrics": {"dice": torch.tensor([[float(rank)]])}})
SafeCheckpoint(f"{folder}/models", {"model": network}, evaluator_for, key_metric="dice").attach(trainer)
evaluator.run(pairs)
evaluator_for.run([0])
trainer.run([0, 1])
following = torch.rand(3)
dist.barrier()

best = load_checkpoint(f"{folder}/models/last.pt")["best"]
assert best["value"] == 0.5, best
later = Engine(lambda engine, batch: {"loss": torch.rand(())})
later.state.max_epochs = 2
resume_from(f"{folder}/models/last.pt", later, {"model": network})
assert torch.equal(torch.rand(3), following)  # each rank its own
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks(tmp_path: Path, repository: Path) -> None:
    errors = run_on_two_ranks(SCRIPT, tmp_path, repository)
    with open(tmp_path / "table" / "metrics.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["moving_id"] for row in rows] == ["m0", "m1", "m2", "m3", "m4"]
    assert [row.get("dice_mean") for row in rows] == ["nan", "0.75", "nan", "0.75", "nan"]
    assert len(list((tmp_path / "events").iterdir())) == 1
    assert "validate" in errors[0] and "validate" not in errors[1]
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["last.pt", "model.pt"]
