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
"""q(v) against PyTorch's own distribution, the published figures, and what it must keep between grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal

from bundles.similarity_learning.scripts import low_rank
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.transformation import BSplineVelocity, StationaryVelocity

SIZES = [(5, 7), (3, 5, 4)]


def random_gaussian(size: tuple[int, ...], rank: int, batch: int = 2) -> LowRankGaussian:
    shape = (batch, len(size), *size)
    factors = torch.randn(batch, rank, *shape[1:])
    return LowRankGaussian(torch.randn(shape), torch.randn(shape) - 1, factors)


def oracle(gaussian: LowRankGaussian) -> LowRankMultivariateNormal:
    columns = gaussian.factors.flatten(2).mT.double()
    return LowRankMultivariateNormal(
        gaussian.mean.flatten(1).double(), columns, gaussian.log_var.flatten(1).exp().double()
    )


@pytest.mark.parametrize("piece", [2**14, 10])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_energies_are_those_of_pytorchs_distribution(
    size: tuple[int, ...], rank: int, piece: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(low_rank, "_PIECE_CPU", piece)
    gaussian = random_gaussian(size, rank).to(device)
    known = oracle(gaussian)
    deviation = torch.randn_like(gaussian.mean)
    constant = 0.5 * deviation[0].numel() * math.log(2 * math.pi)
    log_density = known.log_prob((gaussian.mean + deviation).flatten(1).double())
    determinant, distance = gaussian.half_log_determinant(), gaussian.half_mahalanobis(deviation)
    torch.testing.assert_close((determinant + distance).double(), -log_density - constant, rtol=1e-5, atol=1e-4)
    entropy = known.entropy() - constant - 0.5 * deviation[0].numel()
    torch.testing.assert_close(determinant.double(), entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gaussian.half_energies(-deviation)[1], distance)
    assert determinant.shape == distance.shape == (2,) and determinant.dtype == torch.float32


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gradients_are_those_of_finite_differences(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_PIECE_CPU", 10)
    shape = (2, 2, 3, 2)
    log_var, deviation, noise = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    factors = torch.randn(2, rank, *shape[1:], dtype=torch.float64)
    coefficients = torch.randn(2, rank, dtype=torch.float64)
    for tensor in (log_var, factors, deviation):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(low_rank.half_energies, (log_var, factors, deviation))
    assert torch.autograd.gradcheck(low_rank.low_rank_deviation, (log_var, factors, noise, coefficients))


def test_without_factors_the_parameters_are_independent() -> None:
    gaussian = random_gaussian((5, 7), rank=0)
    deviation = torch.randn_like(gaussian.mean)
    expected = 0.5 * (deviation.square() / gaussian.log_var.exp()).flatten(1).sum(1)
    torch.testing.assert_close(gaussian.half_mahalanobis(deviation), expected)
    torch.testing.assert_close(gaussian.half_log_determinant(), 0.5 * gaussian.log_var.flatten(1).sum(1))


def test_energies_are_kept_in_float32_under_autocast(device: torch.device) -> None:
    gaussian = random_gaussian((6, 5, 4), rank=2).to(device)
    noise, coefficients = gaussian.draw()
    plain = gaussian.deviation(noise, coefficients)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        deviation = gaussian.deviation(noise, coefficients)
        energies = gaussian.half_energies(deviation)
    assert torch.equal(deviation, plain)
    for found, expected in zip(energies, gaussian.half_energies(plain), strict=True):
        assert torch.equal(found, expected)


def test_nothing_but_noise_and_deviation_is_kept_for_the_backward_pass() -> None:
    gaussian = LowRankGaussian.initial(1, (12, 10, 11), 3, rank=2)
    noise, coefficients = gaussian.draw()
    own = {parameter.untyped_storage().data_ptr() for parameter in gaussian.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        energies = gaussian.half_energies(gaussian.deviation(noise, coefficients))
    assert energies[0].requires_grad
    assert sum(count for place, count in kept.items() if place not in own) < 2.1 * gaussian.mean.numel()


def test_samples_have_the_stated_covariance() -> None:
    gaussian = random_gaussian((2, 2), rank=2)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        drawn = gaussian.samples(40000, generator).flatten(2)
    centred = drawn - gaussian.mean.detach().flatten(1).unsqueeze(1)
    expected = oracle(gaussian).covariance_matrix.float()
    found = centred.mT @ centred / drawn.shape[1]
    assert (found - expected).abs().max() < 0.04 * expected.abs().max()
    torch.testing.assert_close(gaussian.marginal_std().flatten(1).square(), expected.diagonal(dim1=1, dim2=2))
    # Of two images nothing is shared, neither the noise nor the coefficients of the factors.
    across = centred[0].mT @ centred[1] / drawn.shape[1]
    assert across.abs().max() < 0.04 * expected.abs().max()


def test_samples_come_in_mirrored_pairs() -> None:
    gaussian = random_gaussian((5, 4), rank=1)
    samples = gaussian.samples(5)
    assert samples.shape == (2, 5, 2, 5, 4)
    torch.testing.assert_close(samples[:, 0] + samples[:, 1], 2 * gaussian.mean)
    torch.testing.assert_close(samples[:, 2] + samples[:, 3], 2 * gaussian.mean)
    assert not torch.allclose(samples[:, 0], samples[:, 2])
    pair = gaussian.antithetic(samples[:, 0] - gaussian.mean)
    torch.testing.assert_close(pair, torch.cat((samples[:, 0], samples[:, 1])))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        gaussian.samples(0)


def test_a_generator_decides_the_draws(device: torch.device) -> None:
    gaussian = random_gaussian((5, 4), rank=2).to(device)
    first, second = (gaussian.draw(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert first[0].device.type == device.type and first[1].shape == (2, 2)
    assert not torch.equal(gaussian.draw()[0], first[0])


def test_deviation_is_scaled_noise_plus_factors() -> None:
    gaussian = LowRankGaussian.initial(2, (3, 2), 2, rank=1, sigma=0.5, factor=0.1)
    deviation = gaussian.deviation(torch.full((2, 2, 3, 2), 2.0), torch.tensor([[1.0], [-3.0]]))
    torch.testing.assert_close(deviation[0], torch.full((2, 3, 2), 1.1))
    torch.testing.assert_close(deviation[1], torch.full((2, 3, 2), 0.7))


@pytest.mark.parametrize("size", SIZES)
def test_the_start_is_as_published_and_its_factors_differ(size: tuple[int, ...]) -> None:
    gaussian = LowRankGaussian.initial(2, size, len(size), rank=4)
    assert torch.equal(gaussian.mean, torch.zeros(2, len(size), *size))
    torch.testing.assert_close(gaussian.log_var, torch.full_like(gaussian.mean, math.log(0.25)))
    assert torch.equal(gaussian.factors[:, 0], torch.full_like(gaussian.mean, 0.1))
    rows = gaussian.factors[0].flatten(1)
    overlap = torch.corrcoef(rows[1:]).fill_diagonal_(0)
    assert overlap.abs().max() < 1e-5 and rows[1:].mean(1).abs().max() < 1e-6 and rows.abs().max() <= 0.1 + 1e-6
    start = torch.randn(2, len(size), *size)
    assert torch.equal(LowRankGaussian.initial(2, size, len(size), mean=start).mean, start)


def test_impossible_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="sigma"):
        LowRankGaussian.initial(1, (4, 4), 2, sigma=0.0)
    with pytest.raises(ValueError, match=r"mean must be \(1, 2, 4, 4\), got \(1, 2, 4, 5\)"):
        LowRankGaussian.initial(1, (4, 4), 2, mean=torch.zeros(1, 2, 4, 5))
    with pytest.raises(ValueError, match=r"factors \(B, R, d, \*L\)"):
        LowRankGaussian(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))


def test_state_survives_a_file_and_half_precision(tmp_path: Path) -> None:
    gaussian = random_gaussian((5, 4), rank=2)
    torch.save(gaussian.state(), tmp_path / "state.pt")
    again = LowRankGaussian.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, tensor in gaussian.state().items():
        assert torch.equal(again.state()[name], tensor)
    half = LowRankGaussian.from_state({name: tensor.half() for name, tensor in gaussian.state().items()})
    assert half.mean.dtype == torch.float32
    torch.testing.assert_close(half.factors, gaussian.factors, rtol=1e-3, atol=1e-3)
    copied = LowRankGaussian.from_state(gaussian.state())
    with torch.no_grad():
        copied.mean.add_(1)
    assert not torch.equal(copied.mean, gaussian.mean)
    with pytest.raises(KeyError, match="factors"):
        LowRankGaussian.from_state({"mean": gaussian.mean, "log_var": gaussian.log_var})


@pytest.mark.parametrize("transformation", [StationaryVelocity(), BSplineVelocity(2), BSplineVelocity((3, 2))])
def test_a_finer_grid_keeps_the_distribution_in_millimetres(
    transformation: StationaryVelocity | BSplineVelocity,
) -> None:
    coarse, fine, factor = (12, 9), (24, 27), (2, 3)
    lattice = transformation.lattice(coarse)
    # A velocity linear in the coarse voxels stays the same velocity in space: linear in the fine voxels.
    spacing = (1, 1) if isinstance(transformation, StationaryVelocity) else transformation._spacings(coarse)
    origin = 0 if isinstance(transformation, StationaryVelocity) else 1
    voxels = [c * (torch.arange(n, dtype=torch.float32) - origin) for n, c in zip(lattice, spacing, strict=True)]
    linear = 0.1 * voxels[0][:, None] - 0.2 * voxels[1]
    mean = torch.stack((linear, 0.5 - linear))[None]
    gaussian = LowRankGaussian.initial(1, lattice, 2, sigma=0.5, factor=0.1, mean=mean)
    carried = transformation.carry(gaussian, fine, factor)
    assert tuple(carried.mean.shape[2:]) == transformation.lattice(fine)
    before, after = transformation.dense(gaussian.mean, coarse), transformation.dense(carried.mean, fine)
    # Voxel (1, 1) of the coarse grid is the middle of fine voxels (2..3, 3..5).
    for place in ((3, 3), (5, 4), (8, 6)):
        block = after[0, :, 2 * place[0] : 2 * place[0] + 2, 3 * place[1] : 3 * place[1] + 3].mean((1, 2))
        torch.testing.assert_close(
            block, before[0, :, place[0], place[1]] * torch.tensor([2.0, 3.0]), atol=1e-4, rtol=1e-4
        )
    scale = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(carried.log_var.mul(0.5).exp(), (0.5 * scale).expand_as(carried.mean))
    torch.testing.assert_close(carried.factors[:, 0], (0.1 * scale).expand_as(carried.mean))


def test_a_grid_of_one_voxel_can_be_refined() -> None:
    gaussian = random_gaussian((1, 3), rank=1)
    carried = gaussian.resized((2, 6), (2, 2))
    torch.testing.assert_close(carried.mean[:, :, 0], carried.mean[:, :, 1])
    assert carried.mean.requires_grad and carried.mean.is_leaf


def test_published_entropy_pieces(shared: Path) -> None:
    known = np.load(shared / "parity/similarity_learning/sobolev_reg_entropy.npz")
    mean, log_var, factor, sample = (torch.from_numpy(known[key]).flip(1) for key in ("mu", "log_var", "u", "sample"))
    gaussian = LowRankGaussian(mean, log_var, factor[:, None])
    determinant, distance = gaussian.half_energies(sample - gaussian.mean)
    torch.testing.assert_close(determinant, torch.from_numpy(known["half_logdet"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(distance, torch.from_numpy(known["half_maha"]), rtol=1e-5, atol=0)
