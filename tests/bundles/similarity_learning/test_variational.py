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
"""The energies of q(v): parity with the published step, and what follows from their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.transformation import build_transformation
from bundles.similarity_learning.scripts.variational import Draws, VariationalProblem
from common.spatial import warp

CASES = [
    ("ssd", "svf", (9, 12)),
    ("lcc", "bspline", (13, 10)),
    ("ssd", "bspline", (6, 7, 9)),
    ("lcc", "svf", (7, 5, 8)),
]


def problem_of(kind: str, transformation: str, dims: int, noise: float = 0.1, **options: bool) -> VariationalProblem:
    return VariationalProblem(
        Similarity(kind, spatial_dims=dims, **options),  # type: ignore[arg-type]
        build_transformation(transformation, steps=5),
        SobolevSmoothing(),
        DifferenceEnergy(1.5),
        noise,
    )


def random_posterior(problem: VariationalProblem, batch: int, size: tuple[int, ...], rank: int = 2) -> LowRankGaussian:
    lattice = problem.transformation.lattice(size)
    shape = (batch, len(size), *lattice)
    factors = 0.3 * torch.randn(batch, rank, len(size), *lattice)
    return LowRankGaussian(torch.randn(shape), -1 + 0.3 * torch.randn(shape), factors)


def random_draws(posterior: LowRankGaussian, size: tuple[int, ...]) -> Draws:
    batch = len(posterior.mean)
    return Draws(*posterior.draw(), 0.2 * torch.rand(2 * batch, len(size), *size) - 0.1)


def test_published_step(shared: Path) -> None:
    """25 iterations of Adam with the published random numbers; their low-rank coefficient is one of the batch."""
    file = np.load(shared / "parity" / "similarity_learning" / "qv_SSD_SVF.npz")

    def array(name: str) -> Tensor:
        return torch.from_numpy(file[name])

    problem = VariationalProblem(
        Similarity("ssd"),
        build_transformation("svf", steps=12),
        SobolevSmoothing(),
        DifferenceEnergy(float(file["w_reg"]), edge_weight=2.0),
    )
    posterior = LowRankGaussian.initial(2, (16, 16, 16), 3)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=float(file["lr"]))
    reference, random = problem.similarity.reference(array("fixed"), array("mask")), np.random.RandomState(99)
    shape = tuple(posterior.mean.shape)
    for iteration, published in enumerate(file["losses"]):
        noise = torch.from_numpy(random.randn(*shape).astype(np.float32)).flip(1)
        coefficient = torch.full((2, 1), float(random.randn(1)[0]))
        uniform = [torch.from_numpy(random.random_sample(shape).astype(np.float32)).flip(1) for _ in range(2)]
        draws = Draws(noise, coefficient, 0.1 - 0.2 * torch.cat(uniform))
        energies = problem.energies(posterior, array("moving"), reference, draws)
        optimizer.zero_grad()
        energies.loss.sum().backward()
        found = [float(energy.detach().sum()) for energy in energies]
        if iteration == 0:
            assert found == pytest.approx(published.tolist(), rel=1e-5)
            _assert_published_gradients(posterior, array)
        optimizer.step()
    assert found == pytest.approx(published.tolist(), rel=1e-3)
    torch.testing.assert_close(posterior.log_var.detach(), array("final_log_var").flip(1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.factors.detach()[:, 0], array("final_u").flip(1), atol=1e-3, rtol=1e-3)
    # Where the gradient is almost 0, Adam's step has the size of the learning rate and a sign that rounding decides:
    # float64 and float32 differ by as much.
    error = (posterior.mean.detach() - array("final_mu").flip(1)).abs()
    assert float(error.max()) < 0.02
    assert float(error.mean()) < 1e-3


def _assert_published_gradients(posterior: LowRankGaussian, array: object) -> None:
    for name, parameter in (("mu", posterior.mean), ("log_var", posterior.log_var), ("u", posterior.factors)):
        assert parameter.grad is not None
        published = array(f"grad1_{name}").flip(1)  # type: ignore[operator]
        found = parameter.grad.reshape(published.shape)
        assert float((found - published).abs().max()) < 1e-3 * float(published.abs().max())


def test_energies_of_a_still_pair_are_known() -> None:
    """No sample moves: data and entropy have closed forms."""
    problem = problem_of("ssd", "svf", 2, noise=0.0)
    posterior = LowRankGaussian.initial(1, (5, 4), 2, sigma=0.5, factor=0.1)
    fixed = torch.rand(1, 1, 5, 4)
    draws = Draws(torch.zeros(1, 2, 5, 4), torch.zeros(1, 1))
    energies = problem.energies(posterior, fixed + 0.3, problem.similarity.reference(fixed), draws)
    assert float(energies.data) == pytest.approx(2 * 0.5 * 20 * 0.09, rel=1e-5)
    assert float(energies.regularisation) == 0
    expected = 0.5 * (np.log1p(40 * 0.01 / 0.25) + 40 * np.log(0.25))
    assert float(energies.entropy) == pytest.approx(expected, rel=1e-5)
    assert float(energies.loss) == pytest.approx(0.9 - expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "transformation", "size"), CASES)
def test_pair_in_one_batch_is_one_sample_at_a_time(kind: str, transformation: str, size: tuple[int, ...]) -> None:
    problem = problem_of(kind, transformation, len(size))
    posterior = random_posterior(problem, 2, size)
    moving, fixed = torch.rand(2, 1, *size), torch.rand(2, 1, *size)
    mask = torch.rand(2, 1, *size) > 0.3
    draws = random_draws(posterior, size)
    energies = problem.energies(posterior, moving, problem.similarity.reference(fixed, mask), draws)
    assert draws.jitter is not None
    for image in range(2):
        reference = problem.similarity.reference(fixed[image, None], mask[image, None])
        data, roughness = 0.0, 0.0
        for sign, jitter in ((1, draws.jitter[image]), (-1, draws.jitter[2 + image])):
            deviation = posterior.deviation(draws.noise, draws.coefficients)[image, None]
            sample = posterior.mean[image, None] + sign * deviation
            ddf = problem.fields(sample, size, noise=jitter[None])
            data += float(problem.similarity.energy(reference, warp(moving[image, None], ddf)).detach())
            roughness += float(problem.regularisation(problem.smoothing(sample)).detach())
        assert float(energies.data[image]) == pytest.approx(data, rel=1e-4)
        assert float(energies.regularisation[image]) == pytest.approx(roughness, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_entropy_is_that_of_the_normal_distribution(rank: int) -> None:
    """Differences of log densities are free of the constants: PyTorch's are the oracle."""
    size, found, known = (4, 5), [], []
    problem = problem_of("ssd", "svf", 2)
    fixed = torch.rand(1, 1, *size)
    for _ in range(2):
        posterior = random_posterior(problem, 1, size, rank)
        draws = random_draws(posterior, size)
        energies = problem.energies(posterior, fixed, problem.similarity.reference(fixed), draws)
        found.append(float(energies.entropy))
        normal = torch.distributions.LowRankMultivariateNormal(
            posterior.mean.flatten().double(),
            posterior.factors.flatten(2)[0].mT.double() if rank else torch.zeros(40, 1).double(),
            posterior.log_var.flatten().double().exp(),
        )
        sample = posterior.mean + posterior.deviation(draws.noise, draws.coefficients)
        known.append(-float(normal.log_prob(sample.flatten().double())))
    assert found[0] - found[1] == pytest.approx(known[0] - known[1], rel=1e-4)


def test_images_of_a_batch_are_independent() -> None:
    size = (8, 9)
    problem = problem_of("lcc", "bspline", 2)
    posterior = random_posterior(problem, 3, size)
    moving, fixed = torch.rand(3, 1, *size), torch.rand(1, 1, *size)
    energies = problem.energies(posterior, moving, problem.similarity.reference(fixed), random_draws(posterior, size))
    energies.loss[1].backward()
    for parameter in posterior.parameters():
        assert parameter.grad is not None
        per_image = parameter.grad.flatten(1).abs().sum(1)
        assert per_image[0] == 0 and per_image[2] == 0 and per_image[1] > 0


def test_jitter_is_uniform_within_its_half_width() -> None:
    problem = problem_of("ssd", "svf", 2, noise=0.25)
    ddf = torch.full((2, 2, 40, 40), 3.0)
    noise = problem.jitter(ddf, torch.Generator().manual_seed(1)) - ddf
    assert float(noise.abs().max()) <= 0.25
    assert float(noise.std()) == pytest.approx(0.25 / 3**0.5, rel=0.05)
    again = problem.jitter(ddf, torch.Generator().manual_seed(1)) - ddf
    torch.testing.assert_close(noise, again)
    assert problem.jitter(ddf, noise=0.0) is ddf
    assert float((problem.jitter(ddf, noise=2.0) - ddf).abs().max()) > 1.5
    torch.testing.assert_close(problem.jitter(ddf, noise=ddf), 2 * ddf)


def test_half_precision_is_for_the_network_alone() -> None:
    size = (12, 11)
    problem, fixed = problem_of("lcc", "bspline", 2), torch.rand(1, 1, *size)
    posterior = random_posterior(problem, 1, size)
    draws, reference = random_draws(posterior, size), problem.similarity.reference(fixed)
    plain = problem.energies(posterior, fixed, reference, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = problem.energies(posterior, fixed, reference, draws)
    for known, found in zip(plain, half, strict=True):
        torch.testing.assert_close(known, found)
        assert found.dtype == torch.float32


def test_learnt_similarity_under_autocast() -> None:
    size = (8, 7, 9)
    problem, fixed = problem_of("ssd", "svf", 3, learnt=True), torch.rand(1, 1, *size)
    posterior = random_posterior(problem, 1, size)
    draws, reference = random_draws(posterior, size), problem.similarity.reference(fixed)
    plain = problem.energies(posterior, fixed, reference, draws)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = problem.energies(posterior, fixed, reference, draws)
    assert half.data.dtype == torch.float32
    torch.testing.assert_close(plain.data, half.data, rtol=0.05, atol=0.05)
    torch.testing.assert_close(plain.regularisation, half.regularisation)


def test_mean_energy() -> None:
    problem, size = problem_of("ssd", "svf", 2), (6, 5)
    posterior = LowRankGaussian.initial(1, size, 2)
    fixed = torch.rand(1, 1, *size)
    reference = problem.similarity.reference(fixed)
    assert float(problem.mean_energy(posterior, fixed - 0.2, reference)) == pytest.approx(0.5 * 30 * 0.04, rel=1e-4)


def test_negative_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"-0\.5"):
        problem_of("ssd", "svf", 2, noise=-0.5)


@pytest.mark.parametrize("gradient", ["straight_through", "exact"])
def test_diagonal_rests_at_its_sigma(gradient: str) -> None:
    """Without anything to see in the images, its gradient there is 0 on average, and is not at half of it."""
    size = (40, 40)
    problem = problem_of("ssd", "svf", 2)
    problem.smoothing = SobolevSmoothing(gradient=gradient)
    image, means = torch.zeros(1, 1, *size), []
    sigma = problem.resting_sigma(2)
    if gradient == "straight_through":
        # Weight 1.5; the Laplacian [-1, 4, -1] at the kernel's middle.
        assert sigma == pytest.approx((1.5 * 4 * (0.58333333**2 - 0.58333333 * 0.15625)) ** -0.5, rel=1e-5)
    for start in (sigma, 0.5 * sigma):
        posterior = LowRankGaussian.initial(1, size, 2, rank=0, sigma=start)
        for _ in range(8):
            problem.energies(posterior, image, problem.similarity.reference(image)).loss.sum().backward()
        assert posterior.log_var.grad is not None
        means.append(abs(float(posterior.log_var.grad[..., 8:-8, 8:-8].mean())))
    assert means[0] < 0.15 * means[1]


def test_no_resting_sigma_without_a_weight() -> None:
    problem = problem_of("ssd", "svf", 2)
    problem.regularisation = DifferenceEnergy(0.0)
    with pytest.raises(ValueError, match="give a sigma"):
        problem.resting_sigma(2)
