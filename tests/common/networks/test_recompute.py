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
"""A module that is computed a second time in the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from common.networks.recompute import recomputed


class _Twice(nn.Module):
    """A layer, run plainly or recomputed."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layer, self.recompute = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = recomputed(self.layer, x) if self.recompute else self.layer(x)
        return out


def test_gradients_are_those_of_a_plain_call() -> None:
    module, x = _Twice(True), torch.randn(5, 3, requires_grad=True)
    wanted = [x, *module.parameters()]
    got = torch.autograd.grad(module(x).square().sum(), wanted)
    module.recompute = False
    for a, b in zip(got, torch.autograd.grad(module(x).square().sum(), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_the_second_run_uses_the_weights_of_the_first() -> None:
    """Weights that are put in for one call are gone by the time of the backward pass."""
    x, gradients = torch.randn(5, 3), []
    given = {name: torch.randn_like(p).requires_grad_() for name, p in _Twice(True).named_parameters()}
    for recompute in (True, False):
        out = functional_call(_Twice(recompute), given, (x,))
        gradients.append(torch.autograd.grad(out.square().sum(), list(given.values())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_random_numbers_are_drawn_once() -> None:
    module, x = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)), torch.ones(1, 3, requires_grad=True)
    out = recomputed(module, x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    kept = (out != 0).float() * 2
    torch.testing.assert_close(gradient, kept @ module[0].get_parameter("weight"))


def test_nothing_but_inputs_is_kept() -> None:
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        recomputed(_Twice(False), torch.randn(5, 3, requires_grad=True))
    assert torch.Size([5, 4]) not in saved


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(training: bool) -> None:
    module = nn.BatchNorm1d(3).train(training)
    x = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(recomputed(module, x), module(x))
