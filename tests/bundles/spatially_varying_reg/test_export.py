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
"""TransMorphSPR and its hyper network, recorded and run on other images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bundles.spatially_varying_reg.scripts.hyper import HyperTransMorphSPR
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR

_SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (2, 2),
    "patch_size": 2,
    "steps": 2,
    "step_channels": 4,
    "integration_steps": 2,
}


def _awake(network: nn.Module) -> nn.Module:
    """Weights under which every part of the network has its say: flow heads start near zero."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.detach().abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


def _assert_same(program: Any, network: nn.Module, size: tuple[int, ...]) -> None:
    image = torch.rand(1, 2, *size)
    with torch.no_grad():
        expected = network(image)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(program(image), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", [(19, 22), (11, 14, 9)])
def test_an_exported_network_computes_the_same(size: tuple[int, ...]) -> None:
    network = _awake(TransMorphSPR(len(size), **_SMALL))
    with torch.no_grad():
        program = torch.export.export(network, (torch.rand(1, 2, *size),)).module()
    _assert_same(program, network, size)


def test_the_condition_of_a_hyper_network_becomes_part_of_the_program() -> None:
    network = _awake(HyperTransMorphSPR(2, rank=2, code_channels=8, alpha=1.15, w=4.0, **{**_SMALL, "depths": (1, 1)}))
    with torch.no_grad():
        program = torch.export.export(network, (torch.rand(1, 2, 19, 22),)).module()
    _assert_same(program, network, (19, 22))
    network.condition(alpha=1.0, w=0.5)
    with pytest.raises(AssertionError, match="not close"):
        _assert_same(program, network, (19, 22))


def test_a_hyper_network_with_a_condition_for_each_item_is_not_exported() -> None:
    network = HyperTransMorphSPR(2, rank=2, code_channels=8, w=(1.0, 2.0), **_SMALL).eval()
    with pytest.raises(ValueError, match="one condition for all items"):
        torch.export.export(network, (torch.rand(2, 2, 16, 16),))
