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
"""The benchmark of starts compares what it says."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.similarity_starts import PUBLISHED, Start, measure, trained_voxelmorph
from bundles.similarity_learning.scripts.network import VariationalRegistration
from bundles.similarity_learning.scripts.posterior import LowRankGaussian


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("size", [(20, 23), (19, 21, 22)])
def test_the_balanced_sigma_leaves_the_variances_where_they_are(size: tuple[int, ...], transformation: str) -> None:
    network = VariationalRegistration(len(size), transformation=transformation, samples=0)
    problem, lattice = network.problem, network.problem.transformation.lattice(size)
    sigma = problem.resting_sigma(len(size))
    q = LowRankGaussian.initial(1, lattice, len(size), sigma=sigma, factor=0.0)
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(q.log_var)
    for _ in range(300):
        smooth = problem.smoothing(q.deviation(*q.draw(generator)))
        (gradient,) = torch.autograd.grad(problem.regularisation(smooth).sum(), q.log_var)
        total += gradient / 300
    inside = (..., *(slice(4, -4),) * len(size))
    # The entropy's derivative in each logarithm is a half.
    assert float(total[inside].mean()) == pytest.approx(0.5, rel=0.03)


def test_a_start_is_measured_against_the_first() -> None:
    others = (
        Start("balanced", balanced=True),
        Start("levels", (2, 1), (10, 6)),
        Start("v", (1,), (6,), amortised=True),
    )
    rows = measure((32, 33), starts=(PUBLISHED, *others), steps=2, iterations=20)
    assert [row["what"] for row in rows] == ["published", "balanced", "levels", "v"]
    first = rows[0]
    assert first["s_to_loss"] == first["cpu_s"] and first["loss_sooner"] == 1
    # The variances begin where they end: the loss is as low at once.
    assert rows[1]["s_to_loss"] < 0.2 * first["cpu_s"]
    assert rows[2]["iterations"] == "10 at 1/2 + 6 at 1/1"
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "energy", "cpu_s"))


def test_voxelmorph_learns_to_register() -> None:
    few, more = (trained_voxelmorph((32, 32), 0.1, steps) for steps in (1, 30))
    changed = [not torch.equal(a, b) for a, b in zip(few.parameters(), more.parameters(), strict=True)]
    assert any(changed) and not more.training
