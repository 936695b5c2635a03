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
"""GraDIRN and its baseline, recorded at one size and run at another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bundles.gradirn.scripts.baseline import VoxelMorphBaseline
from bundles.gradirn.scripts.network import GraDIRN

_SMALL: dict[str, Any] = {"levels": 2, "steps": 1, "channels": 4, "layers": 2}


def _awake(network: nn.Module) -> nn.Module:
    """Weights under which every part of the network has its say: the last layers start at zero."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.detach().abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (2, {"similarity": "lncc", "window": 5, "update": "diffeomorphic"}),
        (3, {"similarity": "ssd"}),
    ],
)
def test_an_exported_network_takes_any_size(dims: int, options: dict[str, Any]) -> None:
    _check_any_size(_awake(GraDIRN(dims, **_SMALL, **options)), dims)


def test_the_exported_baseline_takes_any_size() -> None:
    _check_any_size(_awake(VoxelMorphBaseline(2)), 2)


def _check_any_size(network: nn.Module, dims: int) -> None:
    axes = {2 + axis: torch.export.Dim(f"size{axis}", min=17, max=1024) for axis in range(dims)}
    first = torch.rand(1, 2, *(19, 22, 17)[:dims])
    program = torch.export.export(network, (first,), dynamic_shapes=(axes,)).module()
    for image in (first, torch.rand(1, 2, *(32, 17, 20)[:dims])):
        with torch.no_grad():
            expected = network(image)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(program(image).detach(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_trace_computes_the_same(dims: int) -> None:
    network, size = _awake(GraDIRN(dims, **_SMALL)), (11, 10, 9)[:dims]
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):  # sizes become constants
        traced = torch.jit.trace(network, torch.rand(1, 2, *size), check_trace=False)
    other = torch.rand(1, 2, *size)
    with torch.no_grad():
        torch.testing.assert_close(traced(other), network(other), rtol=0, atol=5e-5)
