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
"""The benchmark's published form computes the same energies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import similarity_learning
from benchmarks.measure import cost_in_this_process
from benchmarks.similarity_learning import Case, Iteration, PublishedProblem, kept_megabytes, measure
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.variational import Draws


@pytest.mark.parametrize("similarity", ["ssd", "lcc"])
@pytest.mark.parametrize("transformation", ["svf", "bspline"])
def test_both_forms_have_one_loss_and_one_gradient(similarity: str, transformation: str) -> None:
    torch.manual_seed(0)
    iteration = Iteration("published", Case(11, similarity, transformation, batch=2))
    for parameter in iteration.q.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    encoder = iteration.problem.similarity.encoder
    assert encoder is not None
    for weight in encoder.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    iteration.reference = iteration.problem.similarity.reference(iteration.fixed, iteration.mask)
    draws = iteration.draw()
    published = iteration.published.loss(iteration.q, iteration.moving, iteration.fixed, iteration.mask, draws)
    theirs = torch.autograd.grad(published, list(iteration.q.parameters()))
    # Vectors run the other way: the same numbers, with components and the axes of space reversed.
    q = LowRankGaussian(*(_turned(x) for x in (iteration.q.mean, iteration.q.log_var, iteration.q.factors)))
    jitter = None if draws.jitter is None else _turned(draws.jitter)
    ours_draws = Draws(_turned(draws.noise), draws.coefficients, jitter)
    ours = iteration.problem.energies(q, iteration.moving, iteration.reference, ours_draws).loss.sum()
    torch.testing.assert_close(ours, published, atol=1e-2, rtol=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, list(q.parameters())), theirs, strict=True):
        # The gradient of linear interpolation jumps from cell to cell: a few voxels may be on either side.
        assert (mine - _turned(other)).norm() < 2e-3 * other.norm()


def _turned(x: torch.Tensor) -> torch.Tensor:
    """(x, y, z) components to those along array axes."""
    return x.detach().flip(-4).contiguous()


def test_the_published_form_meets_the_published_energy(shared: Path) -> None:
    """The first of 25 iterations of plain SSD, with the noise of the authors' order."""
    data = np.load(shared / "parity/similarity_learning/qv_SSD_SVF.npz")
    moving, fixed, mask = (torch.from_numpy(data[name]) for name in ("moving", "fixed", "mask"))
    numbers = np.random.RandomState(int(data["seed"]))
    shape = (len(moving), 3, *moving.shape[2:])
    noise, coefficient = (torch.from_numpy(numbers.standard_normal(s)).float() for s in (shape, (1,)))
    jitter = [0.1 - 0.2 * torch.from_numpy(numbers.random_sample(shape)).float() for _ in range(2)]
    draws = Draws(noise, coefficient.expand(len(moving), 1), torch.cat(jitter))
    q = LowRankGaussian.initial(len(moving), moving.shape[2:], 3)
    problem = PublishedProblem(Similarity("ssd"), "svf", float(data["w_reg"]), moving.shape[2:])
    problem._encode = lambda image: image  # type: ignore[method-assign]
    loss = problem.loss(q, moving, fixed, mask.bool(), draws)
    assert float(loss.detach()) == pytest.approx(float(data["losses"][0, 3]), rel=1e-5)


def test_only_what_was_not_there_before_counts() -> None:
    x, y = torch.rand(2**18, requires_grad=True), torch.rand(2**18)
    assert kept_megabytes(lambda: (x * y).sum(), [x, y]) == 0
    assert kept_megabytes(lambda: (x * y).sum(), [x]) == pytest.approx(1)
    assert kept_megabytes(lambda: (x.exp() * x.exp().detach().clone()).sum(), [x]) == pytest.approx(2)


def test_rows_hold_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_learning, "cost_in_fresh_process", cost_in_this_process)
    rows = measure([Case(12, "lcc", "bspline")], repeats=1)
    assert [row["what"] for row in rows] == ["learnt lcc, bspline, published", "learnt lcc, bspline, ours"]
    assert rows[0]["cpu_over_published"] == rows[0]["kept_over_published"] == 1.0
    assert rows[1]["kept_over_published"] < 0.5 and all(row["cpu_s"] > 0 and row["kept_mb"] > 0 for row in rows)
