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
"""Masks of a batch reach the network that registers it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine

from bundles.similarity_learning.scripts.masks import MaskFromBatch
from bundles.similarity_learning.scripts.network import VariationalRegistration
from common.engines import FieldsModule, RegistrationEvaluator


def test_masks_reach_the_network_for_their_own_batch() -> None:
    network, seen = VariationalRegistration(2, samples=0, iterations=2), []

    def step(engine: Engine, batch: dict[str, Any]) -> None:
        seen.append(None if network.fixed_mask is None else int(network.fixed_mask.sum()))

    engine = Engine(step)
    MaskFromBatch(network).attach(engine)
    engine.run([{"fixed_mask": torch.ones(1, 1, 2, 2)}, {"fixed": 0}, {"fixed_mask": torch.zeros(1, 1, 2, 2)}])
    assert seen == [4, None, 0]
    assert network.fixed_mask is None
    with pytest.raises(AttributeError, match="Linear"):
        MaskFromBatch(torch.nn.Linear(1, 1))


def test_in_an_evaluator_with_masks() -> None:
    """A wall that is in the fixed image alone does not count where the mask is 0."""
    image, ddfs = torch.rand(1, 2, 18, 16), []
    mask = torch.ones(1, 1, 18, 16, dtype=torch.int32)
    mask[..., -4:] = 0
    for wall in (0.0, 1.0):
        moving, fixed = image.clone().chunk(2, dim=1)
        fixed[..., -4:] = wall
        network = VariationalRegistration(2, samples=0, iterations=5)
        evaluator = RegistrationEvaluator(
            device="cpu",
            val_data_loader=[{"moving": moving, "fixed": fixed, "fixed_mask": mask}],
            network=FieldsModule(network),
            val_handlers=[MaskFromBatch(network)],
        )
        evaluator.run()
        ddfs.append(evaluator.state.output["ddf"])
    torch.testing.assert_close(*ddfs)
    network.fixed_mask = mask[..., :3]
    with pytest.raises(ValueError, match="mask must be"):
        network.fields(image)
