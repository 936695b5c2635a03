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
"""How processes meet, and what then differs between them and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from common.engines import join_ranks, leave_ranks
from common.engines.ranks import _device_of
from tests.ranks import fork_two_ranks

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

SCRIPT = """
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from ignite.engine import Events
from monai.data import DistributedSampler

from common.data import RandomPairDataset
from common.engines import RegistrationEvaluator, distribute, join_ranks, leave_ranks, seed_everything
from common.handlers.output import gather_objects
from common.networks import RegistrationNetwork
from common.transforms import RandImagePair

assert join_ranks() == join_ranks() == torch.device("cpu"), "a second time it is the same group"
assert (dist.get_world_size(), dist.get_backend()) == (2, "gloo")

# The seed of the run is that of the first process; noise differs in torch, numpy and MONAI's transforms.
local = gather_objects(seed_everything(7))
assert local[0] == 7 != local[1]
a, b = gather_objects((torch.rand(1).item(), np.random.rand()))
assert a[0] != b[0] and a[1] != b[1], (a, b)

# Random images: each process its own, together those of one process.
dataset = RandomPairDataset(RandImagePair(spatial_size=(16, 16)), length=4, seed=7)
dataset.set_epoch(3)
sampler = DistributedSampler(dataset, even_divisible=True, shuffle=False)
mine = [item["moving"] for item in DataLoader(dataset, batch_size=None, sampler=sampler)]
first, second = gather_objects(mine)
together = [image for pair in zip(first, second) for image in pair]
assert not any(torch.equal(a, b) for k, a in enumerate(together) for b in together[:k])
assert all(torch.equal(a, dataset[k]["moving"]) for k, a in enumerate(together))

# A network with a buffer, which gradient synchronisation sends in every forward pass, and one pair less.
class Shift(RegistrationNetwork):
    def __init__(self):
        super().__init__(2)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("index", torch.arange(3))
    def fields(self, image):
        return {"ddf": self.weight.expand(len(image), 2, *image.shape[2:])}

network = distribute(Shift(), "cpu")
assert isinstance(network, torch.nn.parallel.DistributedDataParallel)
pairs = [{"moving": torch.rand(1, 8, 8), "fixed": torch.rand(1, 8, 8), "moving_id": str(k)} for k in range(3)]
part = DistributedSampler(pairs, even_divisible=False, shuffle=False)
evaluator = RegistrationEvaluator("cpu", DataLoader(pairs, sampler=part), network)
seen = []
evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.extend(engine.state.output["moving_id"]))
evaluator.run()
assert gather_objects(seen) == [["0", "2"], ["1"]], seen
leave_ranks()
leave_ranks()
assert not dist.is_initialized()
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_meet_draw_each_their_own_and_part(repository: Path) -> None:
    fork_two_ranks(["-c", SCRIPT], repository=repository)


def test_one_process_has_the_one_device_and_no_group() -> None:
    assert join_ranks().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not dist.is_initialized()
    leave_ranks()


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"\['RANK', 'WORLD_SIZE'\] but not \['LOCAL_RANK'\]: start .* torchrun"):
        join_ranks()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _device_of(1) == torch.device("cuda", 1)
    with pytest.raises(RuntimeError, match="process 2 of its machine, counted from 0, which has 2 visible GPUs"):
        _device_of(2)
