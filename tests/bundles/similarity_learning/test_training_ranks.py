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
"""Two processes that train a similarity together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.ranks import run_on_two_ranks

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from bundles.similarity_learning.scripts.distributed import average_gradients, share_weights
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.store import PosteriorStore
from common.handlers.output import gather_objects
from tests.bundles.similarity_learning.training_run import Run, Subjects

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

# The mean of gradients; a process without one counts with 0, what is not trained is left out.
layer = torch.nn.Linear(2, 1)
share_weights([layer])
first, second = gather_objects(layer.weight.detach())
assert torch.equal(first, second)
layer.weight.grad = torch.full((1, 2), 2.0 + 4 * rank)
layer.bias.grad = torch.ones(1) if rank else None
frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
average_gradients([layer.weight, frozen, layer.bias])
assert torch.equal(layer.weight.grad, torch.full((1, 2), 4.0)) and layer.bias.grad == 0.5 and frozen.grad is None

# Both visited the pair (a, f): the first rank's result counts. Nobody sees the other's before they meet.
def gaussian(value):
    state = {"mean": torch.full((1, 2, 3, 3), value), "log_var": torch.zeros(1, 2, 3, 3)}
    return LowRankGaussian.from_state({**state, "factors": torch.zeros(1, 1, 2, 3, 3)})

for where in ("memory", "disk"):
    store = PosteriorStore(where, f"{folder}/stored" if where == "disk" else None)
    for turn in (0.0, 10.0):
        store.put([("a", "f"), ("only", str(rank))], LowRankGaussian.from_state({
            name: torch.cat([tensor] * 2) for name, tensor in gaussian(turn + rank).state().items()
        }))
        assert store.get([("a", "f")]).mean[0, 0, 0, 0] == turn + rank
        if turn == 0.0:
            assert ("only", str(1 - rank)) not in store
        dist.barrier()
        store.synchronise()
        found = store.get([("a", "f"), ("only", "0"), ("only", "1")]).mean[:, 0, 0, 0].tolist()
        assert found == [turn, turn, turn + 1], found
        dist.barrier()

def train(name, epochs, where, resume=None):
    # Three subjects on two processes: one of them comes twice in an epoch, and who visits whom changes.
    dataset = Subjects()
    sampler = DistributedSampler(dataset, num_replicas=2, rank=rank, shuffle=True)
    store = PosteriorStore(where, f"{folder}/{name}/q" if where == "disk" else None)
    # Another seed on each rank, as seed_everything gives: other initial weights, other samples.
    run = Run(epochs, store=store, sampler=sampler, seed=7 + rank, batch_size=1, folder=f"{folder}/{name}",
              resume=resume)
    return run.run().everything()

for where in ("memory", "disk"):
    whole = train(f"whole_{where}", 4, where)
    train(f"half_{where}", 2, where)
    dist.barrier()
    resumed = train(f"half_{where}", 4, where, resume=True)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    ranks = gather_objects(resumed)
    assert [name for name in ranks[0] if not torch.equal(ranks[0][name], ranks[1][name])] == []
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_train_one_similarity_and_can_be_interrupted(tmp_path: Path, repository: Path) -> None:
    run_on_two_ranks(SCRIPT, tmp_path, repository)
    assert len(list((tmp_path / "half_disk" / "q").iterdir())) == 3
