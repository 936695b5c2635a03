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
"""Divergence of Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from common.losses import GaussianKL


def test_torch_distributions() -> None:
    mean, log, other, other_log = torch.randn(4, 2, 3, 4, 5)
    first, second = Normal(mean, torch.exp(0.5 * log)), Normal(other, torch.exp(0.5 * other_log))
    expected = kl_divergence(first, second).mean().item()
    assert GaussianKL()(mean, log, other, other_log).item() == pytest.approx(expected, rel=1e-5)


def test_standard_normal_by_hand() -> None:
    value = GaussianKL()(torch.tensor([3.0]), torch.zeros(1))
    assert value.item() == pytest.approx(4.5)
    assert GaussianKL()(torch.zeros(4), torch.zeros(4)).item() == 0


def test_force_of_the_published_start() -> None:
    # At log-variance -10 on both sides a distance of 1 costs exp(10) / 2 = 1.10e4.
    logs = torch.full((7,), -10.0)
    value = GaussianKL()(torch.ones(7), logs, torch.zeros(7), logs).item()
    assert value == pytest.approx(1.10e4, rel=2e-3)


def test_levels_count_alike_whatever_their_size() -> None:
    sizes = [(2, 3), (5,), (1, 4, 4)]
    means, logs, others, other_logs = ([torch.randn(size) for size in sizes] for _ in range(4))
    levels = [GaussianKL()(*level).item() for level in zip(means, logs, others, other_logs, strict=True)]
    assert GaussianKL()(means, logs, others, other_logs).item() == pytest.approx(sum(levels) / 3, rel=1e-5)


def test_one_ensemble_serves_every_level() -> None:
    means, logs = torch.randn(2, 3, 4, 5)
    mean, log = means.mean(0), logs.mean(0)
    expected = GaussianKL()(list(means), list(logs), [mean] * 3, [log] * 3).item()
    assert GaussianKL()(list(means), list(logs), mean, log).item() == pytest.approx(expected)


def test_close_variances_do_not_cancel() -> None:
    logs = torch.full((1,), -10.0)
    close = logs + 2.0**-10  # exact in float32
    value = GaussianKL()(torch.zeros(1), close, torch.zeros(1), logs).item()
    assert value == pytest.approx(0.25 * 2.0**-20, rel=1e-3)


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_extreme_log_variances_stay_finite(extreme: float) -> None:
    mean, log = torch.ones(3, requires_grad=True), torch.full((3,), extreme, requires_grad=True)
    value = GaussianKL()(mean, log, torch.zeros(3), -log)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, (mean, log)))


def test_gradients_reach_both_sides() -> None:
    arguments = [torch.randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(4)]
    assert torch.autograd.gradcheck(GaussianKL(), arguments)


def test_half_precision(device: torch.device) -> None:
    arguments = [torch.randn(2, 3, device=device).bfloat16() for _ in range(4)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value = GaussianKL()(*arguments)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(GaussianKL()(*(a.double() for a in arguments)).item(), rel=1e-5)


def test_errors() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match=r"log_variance has shape \(2,\) but mean has shape \(1,\)"):
        GaussianKL()(one, two)
    with pytest.raises(ValueError, match="both other_mean and other_log_variance"):
        GaussianKL()(one, one, one)
    with pytest.raises(ValueError, match="levels differ: 2 means, 1 log-variances"):
        GaussianKL()([one, one], [one])
    with pytest.raises(ValueError, match="must rise"):
        GaussianKL(limits=(1.0, -1.0))
