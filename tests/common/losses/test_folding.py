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
"""Folded volume as a loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.losses import NonDiffeomorphicVolume
from common.spatial import identity_grid


def waves(amplitude: float) -> Tensor:
    """The field of the parity figures."""
    i, j, k = identity_grid((24, 30, 26))
    turn = 2 * math.pi
    parts = (
        torch.sin(turn * j / 11) * torch.cos(turn * k / 9),
        torch.cos(turn * i / 10 + 0.3),
        torch.sin(turn * (i + j) / 13),
    )
    return amplitude * torch.stack(parts).unsqueeze(0)


@pytest.mark.parametrize("amplitude", ["0.5", "1.0", "2.0", "3.0"])
def test_published(shared: Path, amplitude: str) -> None:
    figures = json.loads((shared / "parity" / "dual_stream_pyramid" / "small_refs.json").read_text())
    figures = figures["metrics_field_24x30x26"][amplitude]
    ddf = waves(float(amplitude))
    assert NonDiffeomorphicVolume("sum")(ddf).item() == pytest.approx(figures["ndv_sum_sitreg"], rel=1e-5)
    assert 100 * NonDiffeomorphicVolume()(ddf).item() == pytest.approx(figures["ndv_percent"], rel=1e-5)


@pytest.mark.parametrize("shape", [(7, 6), (5, 6, 7)])
def test_a_reflection_folds_everything_once(shape: tuple[int, ...], device: torch.device) -> None:
    ddf = torch.zeros(1, len(shape), *shape, device=device)
    ddf[:, 0] = -2 * identity_grid(shape, device=device)[0]
    assert NonDiffeomorphicVolume()(ddf).item() == pytest.approx(1.0, rel=1e-5)
    inner = math.prod(size - 2 for size in shape)
    assert NonDiffeomorphicVolume("sum")(ddf).item() == pytest.approx(inner, rel=1e-5)


def test_mask_counts_only_inside() -> None:
    ddf = waves(2.0)
    assert NonDiffeomorphicVolume()(ddf, torch.ones(1, 1, 24, 30, 26)).item() == pytest.approx(
        NonDiffeomorphicVolume()(ddf).item(), rel=1e-6
    )
    left, right = torch.zeros(2, 1, 1, 24, 30, 26)
    left[..., :13], right[..., 13:] = 1, 1
    loss = NonDiffeomorphicVolume("sum")
    assert (loss(ddf, left) + loss(ddf, right)).item() == pytest.approx(loss(ddf).item(), rel=1e-5)
    assert NonDiffeomorphicVolume()(ddf, torch.zeros(1, 1, 24, 30, 26)).item() == 0


def test_batch_is_averaged() -> None:
    folded, sound = waves(3.0), waves(0.5)
    loss = NonDiffeomorphicVolume()
    assert loss(torch.cat([folded, sound])).item() == pytest.approx(loss(folded).item() / 2, rel=1e-6)


def test_published_weight_in_either_reduction() -> None:
    """Voxels summed over a batch, mean of both directions, weight 1e-5; and what the documentation makes of it."""
    fields = [torch.cat([waves(3.0), waves(2.0)]), torch.cat([-waves(2.0), waves(1.0)])]
    summed = sum(NonDiffeomorphicVolume("sum")(f[item : item + 1]).item() for f in fields for item in range(2)) / 2
    assert sum(2 * 0.5e-5 * NonDiffeomorphicVolume("sum")(f).item() for f in fields) == pytest.approx(1e-5 * summed)
    weight = 2 * 0.5e-5 * 22 * 28 * 24
    assert sum(weight * NonDiffeomorphicVolume()(f).item() for f in fields) == pytest.approx(1e-5 * summed)
    assert pytest.approx(66.6, abs=0.1) == 158 * 222 * 190 * 1e-5


def test_descent_unfolds() -> None:
    ddf = (2 * torch.randn(1, 2, 8, 8)).requires_grad_()
    loss, optimiser = NonDiffeomorphicVolume(), torch.optim.Adam([ddf], lr=0.1)
    before = loss(ddf).item()
    for _ in range(60):
        optimiser.zero_grad()
        loss(ddf).backward()
        optimiser.step()
    assert before > 0.1
    assert loss(ddf).item() < 0.05 * before


def test_no_gradient_without_folds() -> None:
    ddf = waves(0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(NonDiffeomorphicVolume()(ddf), ddf)
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    ddf = (2 * torch.randn(1, len(shape), *shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(NonDiffeomorphicVolume("sum"), (ddf,))


def test_half_precision(device: torch.device) -> None:
    ddf = waves(2.0).to(device, torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = NonDiffeomorphicVolume()(ddf)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(NonDiffeomorphicVolume()(ddf.float()).item(), rel=1e-6)


def test_errors() -> None:
    with pytest.raises(ValueError, match="reduction must be one of"):
        NonDiffeomorphicVolume("max")
    with pytest.raises(ValueError, match="NonDiffeomorphicVolume: ddf must be"):
        NonDiffeomorphicVolume()(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="3 voxels along every axis"):
        NonDiffeomorphicVolume()(torch.zeros(1, 2, 4, 2))
