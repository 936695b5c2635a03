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
"""Images around the atlas."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import LowRankMultivariateNormal

from bundles.similarity_learning.scripts.image_posterior import ImageGaussian
from bundles.similarity_learning.scripts.smoothing import sobolev_kernel


@pytest.mark.parametrize("size", [(5, 4), (3, 4, 2)])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_moments_and_entropy(size: tuple[int, ...], rank: int) -> None:
    posterior, count = ImageGaussian(torch.full((1, 1, *size), 0.5), rank=rank), len(torch.zeros(size).flatten())
    torch.nn.init.uniform_(posterior.log_var, -6.0, -5.0)
    factors = torch.nn.init.uniform_(posterior.factors, -0.05, 0.05).reshape(rank, count).T.detach()
    oracle = LowRankMultivariateNormal(
        torch.full((count,), 0.5),
        factors if rank else torch.zeros(count, 1),
        posterior.log_var.exp().flatten().detach(),
    )
    entropy = oracle.entropy() - 0.5 * count * (1 + torch.log(torch.tensor(2 * torch.pi)))
    torch.testing.assert_close(posterior.half_log_determinant(), entropy[None], rtol=1e-4, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([torch.cat(posterior.pair(*posterior.draw(generator))).flatten(1) for _ in range(4000)])
    torch.testing.assert_close(images.mean(0), oracle.mean)  # pairs are mirrored at the mean
    spread = torch.cov(images.T.detach())
    assert (spread - oracle.covariance_matrix).abs().max() < 0.1 * oracle.covariance_matrix.abs().max()


def test_it_begins_as_published() -> None:
    atlas = torch.rand(1, 1, 6, 5)
    posterior = ImageGaussian(atlas)
    torch.testing.assert_close(posterior.log_var, torch.full((1, 1, 6, 5), 2 * torch.log(torch.tensor(0.1)).item()))
    torch.testing.assert_close(posterior.factors, torch.full((1, 1, 1, 6, 5), 0.1))
    # Equal factors would stay equal.
    modes = ImageGaussian(atlas, rank=3).factors.flatten(2).squeeze(0).detach()
    assert torch.linalg.matrix_rank(modes) == 3


def test_images_and_parameters_keep_within_their_limits() -> None:
    posterior = ImageGaussian(torch.rand(1, 1, 9, 8))
    torch.nn.init.uniform_(posterior.log_var, -3.0, 3.0)
    torch.nn.init.uniform_(posterior.factors, -3.0, 3.0)
    plus, minus = posterior.pair(*posterior.draw())
    assert plus.min() == minus.min() == 0
    assert plus.max() == minus.max() == 1
    posterior.clamp_()
    assert posterior.log_var.max() == 0
    assert posterior.log_var.min() < -2
    assert posterior.factors.min() == -1
    assert posterior.factors.max() == 1
    # Beyond the limits of an image there is no gradient.
    plus, minus = posterior.pair(*posterior.draw())
    (gradient,) = torch.autograd.grad(plus.sum() + minus.sum(), posterior.log_var)
    inside = (plus > 0) & (plus < 1) | (minus > 0) & (minus < 1)
    assert torch.equal(gradient != 0, inside ^ ((plus > 0) & (plus < 1) & (minus > 0) & (minus < 1)))


def test_the_atlas_is_no_part_of_the_state(device: torch.device) -> None:
    posterior = ImageGaussian(torch.rand(1, 1, 6, 5)).to(device)
    assert set(posterior.state_dict()) == {"log_var", "factors"}
    assert posterior.mean.device.type == device.type
    draws = posterior.draw(torch.Generator().manual_seed(3))
    assert [tuple(d.shape) for d in draws] == [(1, 1, 6, 5), (1, 1)]
    assert all(d.device.type == device.type for d in draws)
    torch.testing.assert_close(posterior.draw(torch.Generator().manual_seed(3)), draws)


def test_more_than_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(1, 1, \*S\), got \(2, 1, 6, 5\)"):
        ImageGaussian(torch.rand(2, 1, 6, 5))


@pytest.mark.parametrize("size", [(19, 21), (17, 18, 19)])
def test_smooth_images(size: tuple[int, ...]) -> None:
    """One voxel's noise is spread by the kernel along each axis; the gradient is that of the smoothing."""
    posterior = ImageGaussian(torch.zeros(1, 1, *size), sigma=0.5, factor=0.0, smoothing=0.3)
    noise = torch.zeros(1, 1, *size)
    noise[(0, 0, *[n // 2 for n in size])] = 1.0
    deviation = posterior.deviation(noise, torch.zeros(1, 1))
    taps = torch.tensor(sobolev_kernel(7, 0.3))
    spread = 0.5 * (torch.einsum("i,j->ij", taps, taps) if len(size) == 2 else torch.einsum("i,j,k->ijk", *[taps] * 3))
    middle = tuple(slice(n // 2 - 7, n // 2 + 8) for n in size)
    torch.testing.assert_close(deviation[(0, 0, *middle)], spread, atol=1e-7, rtol=1e-5)
    assert deviation.sum().item() == pytest.approx(0.5, abs=1e-5)
    deviation.square().sum().backward()
    assert posterior.log_var.grad is not None
    assert posterior.log_var.grad.sum().item() == pytest.approx(float(spread.square().sum()), rel=1e-4)
