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
"""The inner loop: it registers, leaves the network as it was, and starts where it is told to."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts import inner_loop as module
from bundles.similarity_learning.scripts.inner_loop import InnerLoop, frozen
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import VariationalProblem
from common.engines import NonFiniteLossError
from common.networks import RegistrationNetwork
from common.spatial import identity_grid, warp


def problem_of(
    kind: str = "ssd", transformation: str = "svf", dims: int = 2, learnt: bool = False, steps: int = 5
) -> VariationalProblem:
    return VariationalProblem(
        Similarity(kind, learnt, dims),
        build_transformation(transformation, steps),
        SobolevSmoothing(),
        DifferenceEnergy(),
    )


def discs(*size: int, shift: float = 2.0) -> tuple[Tensor, Tensor]:
    """A bright disc with a core, and the same ``shift`` voxels further along each axis; (1, 1, *size) each."""
    grid = identity_grid(size)
    middle = torch.tensor([(n - 1) / 2 for n in size]).view(-1, *(1,) * len(size))

    def disc(offset: float) -> Tensor:
        radius = (grid - middle - offset).norm(dim=0)
        scale = min(size)
        return (0.6 * torch.sigmoid(0.3 * scale - radius) + 0.4 * torch.sigmoid(0.15 * scale - radius))[None, None]

    return disc(-shift / 2), disc(shift / 2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(problem: VariationalProblem, posterior: LowRankGaussian, moving: Tensor, fixed: Tensor) -> float:
    """Mean squared difference after registration by the mean."""
    with torch.no_grad():
        ddf = problem.displacement(posterior.mean, moving.shape[2:])
    return float((warp(moving, ddf) - fixed).square().mean())


class Push(RegistrationNetwork):
    """A network that has learnt one velocity."""

    def __init__(self, dims: int, *velocity: float, name: str = "velocity") -> None:
        super().__init__(dims)
        self.value = torch.nn.Parameter(torch.tensor(velocity).view(1, dims, *(1,) * dims))
        self.name = name

    def fields(self, image: Tensor) -> dict[str, Any]:
        field = self.value.expand(len(image), -1, *image.shape[2:])
        return {"ddf": field, self.name: field}


@pytest.mark.parametrize("kind", ["ssd", "lcc"])
@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("size", [(23, 26), (13, 12, 15)])
def test_it_registers(kind: str, transformation: str, size: tuple[int, ...]) -> None:
    problem, (moving, fixed) = problem_of(kind, transformation, len(size)), discs(*size)
    loop = InnerLoop(120 if len(size) == 2 else 70, 0.03, levels=(2, 1))
    fit = loop.fit(problem, moving, fixed, generator=seeded())
    reference = problem.similarity.reference(fixed)
    start = problem.mean_energy(loop.initial(problem, moving, fixed), moving, reference)
    assert float(problem.mean_energy(fit.posterior, moving, reference)) < float(start) - 0.3 * abs(float(start))
    assert error(problem, fit.posterior, moving, fixed) < 0.6 * float((moving - fixed).square().mean())
    assert tuple(fit.posterior.mean.shape[2:]) == problem.transformation.lattice(size)
    assert fit.trace.shape == (sum(fit.counts), 4, 1)
    torch.testing.assert_close(fit.trace[:, 3], 0.5 * (fit.trace[:, 0] + fit.trace[:, 1]) - fit.trace[:, 2])


def test_learnt_similarity_is_left_as_it_was(device: torch.device) -> None:
    problem = problem_of("lcc", learnt=True).to(device)
    similarity = problem.similarity.train()
    next(similarity.parameters()).requires_grad_(False)
    flags, weights = [p.requires_grad for p in similarity.parameters()], copy.deepcopy(similarity.state_dict())
    moving, fixed = (image.to(device) for image in discs(16, 17))
    fit = InnerLoop(3).fit(problem, moving, fixed)
    assert fit.posterior.mean.device.type == device.type
    assert [p.requires_grad for p in similarity.parameters()] == flags
    assert all(p.grad is None for p in similarity.parameters())
    assert similarity.training and all(part.training for part in similarity.modules())
    for name, value in similarity.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=0)


def test_frozen_releases_after_an_error() -> None:
    similarity = Similarity("ssd", True, 2)
    with pytest.raises(RuntimeError, match="within"), frozen(similarity):
        assert not any(p.requires_grad for p in similarity.parameters())
        raise RuntimeError("within")
    assert all(p.requires_grad for p in similarity.parameters())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_may_have_gradients_off(context: Any) -> None:
    problem = problem_of("ssd", learnt=True)
    known = InnerLoop(3).fit(problem, *discs(14, 12), generator=seeded())
    with context():
        found = InnerLoop(3).fit(problem, *discs(14, 12), generator=seeded())
    torch.testing.assert_close(known.posterior.mean, found.posterior.mean)


def test_under_autocast() -> None:
    problem, (moving, fixed) = problem_of("ssd", learnt=True), discs(18, 17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit = InnerLoop(80, 0.03).fit(problem, moving, fixed, generator=seeded())
    assert fit.posterior.mean.dtype == fit.trace.dtype == torch.float32
    assert error(problem, fit.posterior, moving, fixed) < 0.35 * float((moving - fixed).square().mean())


def test_same_numbers_same_fit() -> None:
    problem, pair, loop = problem_of("lcc", "bspline"), discs(15, 13), InnerLoop(4, levels=(2, 1))
    first, second, other = (loop.fit(problem, *pair, generator=seeded(seed)).posterior.mean for seed in (1, 1, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_images_of_a_batch_do_not_meet() -> None:
    """What the second pair is does not change the first one's result."""
    problem, (moving, fixed) = problem_of("lcc"), discs(14, 15)
    results = [
        InnerLoop(4).fit(problem, torch.cat((moving, other)), fixed, generator=seeded()).posterior.mean[0]
        for other in (moving, moving.flip(2))
    ]
    torch.testing.assert_close(*results)


def test_fixed_images_are_encoded_once_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, reference = [], Similarity.reference

    def counted(self: Similarity, fixed: Tensor, mask: Tensor | None = None) -> Any:
        sizes.append(tuple(fixed.shape[2:]))
        return reference(self, fixed, mask)

    monkeypatch.setattr(Similarity, "reference", counted)
    fit = InnerLoop(6, levels=(4, 2, 1), level_iterations=(3, 2, 4)).fit(problem_of(), *discs(18, 24))
    assert sizes == [(5, 6), (9, 12), (18, 24)]
    assert fit.counts == (3, 2, 4)


def test_mask_decides_what_counts() -> None:
    """A bright wall that only the fixed image has, outside of the mask, has no influence at all."""
    problem, (moving, fixed) = problem_of(), discs(20, 18)
    mask = torch.ones_like(fixed, dtype=torch.bool)
    mask[..., -5:] = False
    wall = fixed.clone()
    wall[..., -5:] = 1
    means = [InnerLoop(5).fit(problem, moving, f, mask, generator=seeded()).posterior.mean for f in (fixed, wall)]
    torch.testing.assert_close(*means)
    other = InnerLoop(5).fit(problem, moving, wall, generator=seeded()).posterior.mean
    assert not torch.allclose(means[0], other)
    numbers = InnerLoop(5).fit(problem, moving, wall, mask.to(torch.int32), generator=seeded()).posterior.mean
    torch.testing.assert_close(means[0], numbers)


def test_given_distribution_is_fitted_on() -> None:
    problem, pair = problem_of(), discs(20, 18)
    loop = InnerLoop(5, levels=(2, 1), level_iterations=(2, 3))
    start = loop.fit(problem, *pair, generator=seeded()).posterior
    before = start.mean.detach().clone()
    fit = loop.fit(problem, *pair, posterior=start, generator=seeded())
    assert fit.posterior is start
    assert fit.counts == (5,)
    assert 0 < float((start.mean - before).abs().max()) < 0.1
    assert loop.fit(problem, *pair, posterior=start, iterations=2).counts == (2,)
    assert loop.fit(problem, *pair, iterations=10).counts == (4, 6)


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
def test_coarse_levels_reach_the_energy_in_a_third_of_the_iterations(transformation: str) -> None:
    problem, pair = problem_of("ssd", transformation), discs(33, 30, shift=4)
    alone = InnerLoop(180).fit(problem, *pair, generator=seeded())
    levels = InnerLoop(levels=(4, 2, 1), level_iterations=(60, 60, 50)).fit(problem, *pair, generator=seeded())
    assert float(levels.energies.loss) < float(alone.energies.loss)
    assert error(problem, levels.posterior, *pair) < 1.2 * error(problem, alone.posterior, *pair)


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("levels", [(1,), (2, 1)])
def test_network_gives_the_start(transformation: str, levels: tuple[int, ...]) -> None:
    problem, (moving, fixed) = problem_of("ssd", transformation), discs(20, 17)
    network = Push(2, -2.0, -1.0).train()
    loop = InnerLoop(levels=levels, start=network, learning_rate=1e-6, level_iterations=(1,) * len(levels))
    fit = loop.fit(problem, moving, fixed)
    ddf = problem.displacement(fit.posterior.mean.detach(), (20, 17))
    torch.testing.assert_close(ddf, network.value.detach().expand_as(ddf), atol=1e-3, rtol=0)
    assert network.training
    initial = loop.initial(problem, moving, fixed)
    torch.testing.assert_close(initial.mean.detach(), network.value.detach().expand_as(initial.mean))


def test_start_needs_a_velocity() -> None:
    with pytest.raises(ValueError, match=r"Push gives .*'flow'"):
        InnerLoop(1, start=Push(2, 0.0, 0.0, name="flow")).fit(problem_of(), *discs(12, 12))


def test_initial_distribution_has_the_settings() -> None:
    moving, fixed = discs(9, 8)
    found = InnerLoop(rank=3, sigma=0.2, factor=0.4).initial(problem_of(), moving, fixed)
    assert found.rank == 3
    assert float(found.log_var[0, 0, 0, 0]) == pytest.approx(2 * math.log(0.2))
    assert float(found.factors[0, 0, 0, 0, 0]) == pytest.approx(0.4)
    assert not found.mean.any()
    resting = InnerLoop(sigma=None).initial(problem_of(), moving, fixed)
    assert float(resting.log_var[0, 0, 0, 0].exp().sqrt()) == pytest.approx(problem_of().resting_sigma(2))


def test_tolerance_ends_a_level_early() -> None:
    problem, (moving, _) = problem_of(), discs(12, 12)
    # Nothing to register: the energy falls for a while as the variances settle.
    assert InnerLoop(200, tolerance=0.5).fit(problem, moving, moving, generator=seeded()).counts[0] < 200
    assert InnerLoop(120, tolerance=None).fit(problem, moving, moving).counts == (120,)
    assert InnerLoop(75, tolerance=0.0).fit(problem, moving, moving, generator=seeded()).counts == (75,)


def test_no_number_is_an_error() -> None:
    moving, fixed = discs(12, 12)
    both = torch.cat((moving, torch.full_like(moving, math.nan)))
    with pytest.raises(NonFiniteLossError, match=r"iteration 0 .* 'data' of image 1"):
        InnerLoop(3).fit(problem_of(), both, fixed)  # q(v) is no number from the second iteration on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "positive"),
        ({"learning_rate": 0.0}, "positive"),
        ({"levels": (2,)}, "fall to 1"),
        ({"levels": (2, 1), "level_iterations": (5,)}, "one number for each"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InnerLoop(**options)


def test_shapes_are_checked() -> None:
    problem, (moving, fixed) = problem_of(), discs(12, 12)
    for pair in (
        (moving.expand(-1, 2, -1, -1), fixed),
        (moving, fixed[..., :9]),
        (moving, fixed.expand(2, -1, -1, -1)),
        (moving, fixed, fixed[..., :9]),
        (moving.expand(3, -1, -1, -1), fixed, fixed.expand(2, -1, -1, -1)),
    ):
        with pytest.raises(ValueError, match=r"12"):
            InnerLoop(1).fit(problem, *pair)


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is no terminal; and nothing unless asked for."""
    clock = iter(range(0, 100_000, 31))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        InnerLoop(4, levels=(2, 1), level_iterations=(2, 4)).fit(problem_of(), *discs(12, 12))
        assert not caplog.messages
        InnerLoop(4, levels=(2, 1), level_iterations=(2, 4), progress=True).fit(problem_of(), *discs(12, 12))
    assert caplog.messages[0].startswith("q(v) 1/2 2/2: data ")
    assert [message.split(":")[0] for message in caplog.messages[1:]] == ["q(v) 2/4", "q(v) 4/4"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    InnerLoop(3, progress=True).fit(problem_of(), *discs(12, 12))
    assert "q(v)" in capsys.readouterr().err
