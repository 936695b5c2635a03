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
"""The contrastive step: published figures, and a linear model whose likelihood is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts.contrastive import ContrastiveObjective, set_trainable
from bundles.similarity_learning.scripts.image_posterior import ImageGaussian
from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.transformation import StationaryVelocity
from common.spatial import warp
from tests.bundles.similarity_learning.test_similarity import images, published_weights

SIZE = (16, 16, 16)


def by_name(path: Path) -> dict[str, Tensor]:
    arrays = np.load(path)
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def test_three_steps_have_the_published_values(shared: Path) -> None:
    """Network and q_f, with the published random numbers; vectors there are (x, y, z)."""
    folder = shared / "parity" / "similarity_learning"
    figures, data = by_name(folder / "qphi_SSD_SVF.npz"), by_name(folder / "qv_SSD_SVF.npz")
    similarity, image_posterior = Similarity("ssd", learnt=True), ImageGaussian(data["fixed"])
    similarity.load_state_dict(published_weights(figures, "model0"))
    values = [data[f"final_{name}"].flip(1) for name in ("mu", "log_var", "u")]
    posterior = LowRankGaussian(values[0], values[1], values[2][:, None])
    smoothing, transformation = SobolevSmoothing(), StationaryVelocity()
    optimizers = [torch.optim.Adam(similarity.parameters(), 1e-5), torch.optim.Adam(image_posterior.parameters(), 1e-3)]
    random = np.random.RandomState(int(figures["seed"]))

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.randn(*shape).astype(np.float32))

    def jitter() -> Tensor:
        return 0.1 - 0.2 * torch.from_numpy(random.random_sample((2, 3, *SIZE)).astype(np.float32)).flip(1)

    for step in range(3):
        image_posterior.clamp_()
        noise, coefficient, first = normal(2, 3, *SIZE).flip(1), normal(1), jitter()
        draws = (normal(1, 1, *SIZE), normal(1, 1))
        with torch.no_grad():
            velocity = posterior.mean + posterior.deviation(noise, coefficient.expand(2, 1))
            ddf = transformation(smoothing(velocity), SIZE)
            moved = [warp(data["moving"], ddf + added) for added in (first, jitter(), jitter())]
        terms = ContrastiveObjective()(similarity, image_posterior, moved, data["mask"][:1], draws)
        found = torch.stack([*(2 * terms[name] for name in ("model", "plus", "minus")), terms["loss"]])
        torch.testing.assert_close(found.double(), figures["terms"][step], rtol=1e-5, atol=0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        terms["loss"].backward()
        if step == 0:
            gradients = published_weights(figures, "grad1")
            gradients = {name: (similarity.get_parameter(name).grad, value) for name, value in gradients.items()}
            gradients["log_var"] = (image_posterior.log_var.grad, figures["grad1_qf.log_var"])
            gradients["factors"] = (image_posterior.factors.grad, figures["grad1_qf.u"][:, None])
            for gradient, expected in gradients.values():
                assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max()
        for optimizer in optimizers:
            optimizer.step()
    for name, expected in published_weights(figures, "model3").items():
        # The last bias cancels in the difference of two maps. Adam makes whole steps of 1e-5 of the rounding left.
        atol = 6e-5 if name == "encoder.convolutions.2.bias" else 1e-6
        torch.testing.assert_close(similarity.get_parameter(name).data, expected, rtol=0, atol=atol)
    torch.testing.assert_close(image_posterior.log_var.data, figures["qf3.log_var"], rtol=0, atol=1e-5)
    torch.testing.assert_close(image_posterior.factors.data[:, 0], figures["qf3.u"], rtol=0, atol=1e-5)


def linear_model() -> tuple[Similarity, Tensor]:
    """A similarity of two voxels with a linear network, and how the two voxels enter it: a matrix A."""
    similarity = Similarity("ssd", learnt=True, spatial_dims=2)
    assert similarity.encoder is not None
    similarity.encoder.slope = 1.0
    generator = torch.Generator().manual_seed(5)
    for weights in similarity.parameters():
        torch.nn.init.normal_(weights, std=0.35, generator=generator)
    return similarity, matrix(similarity)


def matrix(similarity: Similarity) -> Tensor:
    assert similarity.encoder is not None
    basis = torch.eye(2).view(2, 1, 1, 2)
    columns = similarity.encoder(basis) - similarity.encoder(torch.zeros(1, 1, 1, 2))
    return columns.flatten(1).T


def averaged(similarity: Similarity, posterior: ImageGaussian, moved: Tensor, kind: str = "bound") -> Tensor:
    """The loss's mean over all draws: exact for a quadratic energy, by one draw along each of its three numbers."""
    draws = math.sqrt(3) * torch.eye(3)
    losses = [
        ContrastiveObjective(kind)(
            similarity, posterior, [moved] * 3, draws=(draw[:2].view(1, 1, 1, 2), draw[2:].view(1, 1))
        )["loss"]
        for draw in draws
    ]
    return torch.stack(losses).mean()


def test_the_bound_is_below_the_likelihood_and_tight_for_the_right_images() -> None:
    """For D = |A(F - M)|² / 2 in two voxels: log Z = log 2 pi - log |det A|, and the best q has variance (AᵀA)⁻¹."""
    similarity, a = linear_model()
    a = a.detach()
    fixed, moved = torch.tensor([0.3, 0.8]).view(1, 1, 1, 2), torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)
    model = 0.5 * (a @ (fixed - moved).flatten()).square().sum()
    # -log p(F | M), less the constant n (1 + log 2 pi) / 2 that the entropy leaves out.
    exact = model - a.det().abs().log() - 1.0
    posterior = ImageGaussian(fixed)
    optimizer = torch.optim.Adam(posterior.parameters(), 0.1)
    start = averaged(similarity, posterior, moved)
    covariance = torch.diag(posterior.log_var.exp().flatten()) + posterior.factors.flatten().outer(
        posterior.factors.flatten()
    )
    by_hand = model - 0.5 * (a.T @ a @ covariance).trace() + 0.5 * covariance.logdet()
    torch.testing.assert_close(start, by_hand)
    assert start < exact - 1.0
    for _ in range(120):
        optimizer.zero_grad()
        averaged(similarity, posterior, moved).backward()
        optimizer.step()
    best = averaged(similarity, posterior, moved)
    torch.testing.assert_close(best, exact, rtol=0, atol=1e-3)
    # At the best q the network's gradient is that of the likelihood.
    similarity.zero_grad()
    best.backward()
    network = [p for p in similarity.parameters() if p.ndim > 1]  # biases cancel in the difference
    a = matrix(similarity)
    likelihood = 0.5 * (a @ (fixed - moved).flatten()).square().sum() - a.det().abs().log()
    for parameter, expected in zip(network, torch.autograd.grad(likelihood, network), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


def test_the_published_difference_says_nothing_of_the_moved_image_in_a_linear_model() -> None:
    similarity, _ = linear_model()
    posterior = ImageGaussian(torch.tensor([0.45, 0.55]).view(1, 1, 1, 2), sigma=0.05, factor=0.05)
    parameters = list(similarity.parameters())
    gradients = [
        torch.autograd.grad(averaged(similarity, posterior, torch.rand(1, 1, 1, 2), "published"), parameters)
        for _ in range(2)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["published", "bound"])
@pytest.mark.parametrize("size", [(9, 8), (7, 6, 5)])
@pytest.mark.parametrize("energy", ["ssd", "lcc"])
def test_terms(kind: str, size: tuple[int, ...], energy: str) -> None:
    similarity, posterior = Similarity(energy, True, len(size)), ImageGaussian(images(1, 1, *size), rank=2)
    moved, mask = [images(3, 1, *size) for _ in range(3)], torch.rand(1, 1, *size) > 0.2
    draws = posterior.draw()
    terms = ContrastiveObjective(kind)(similarity, posterior, moved, mask, draws)
    assert set(terms) == {"model", "plus", "minus", "entropy", "loss"}
    value = terms["model"] - 0.5 * (terms["plus"] + terms["minus"]) + (terms["entropy"] if kind == "bound" else 0)
    torch.testing.assert_close(terms["loss"], value)
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]
    expected = similarity.energy(similarity.reference(posterior.mean, mask), moved[0]).mean()
    torch.testing.assert_close(terms["model"], expected.detach())
    if kind == "published":
        minus = posterior.pair(*draws)[1]
        expected = similarity.energy(similarity.reference(minus, mask), moved[2]).mean()
    else:
        expected = similarity.energy(
            similarity.reference(moved[2] - posterior.deviation(*draws), mask), moved[2]
        ).mean()
    torch.testing.assert_close(terms["minus"], expected.detach())
    terms["loss"].backward()
    for parameter in (*similarity.parameters(), *posterior.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        # Where all features are positive the difference of two maps has no biases in it.
        assert parameter.grad.abs().max() > 0 or parameter.ndim == 1


@pytest.mark.parametrize("kind", ["published", "bound"])
def test_images_move_as_documented(kind: str) -> None:
    """One step of descent makes the samples' energy larger as published, and the bound's E[D] - H smaller."""
    similarity, posterior = Similarity("ssd", True, 2), ImageGaussian(torch.full((1, 1, 9, 8), 0.5), 0.3)
    moved, draws = [images(1, 1, 9, 8)] * 3, posterior.draw()
    optimizer = torch.optim.SGD(posterior.parameters(), 1e-4)

    def cost() -> Tensor:
        terms = ContrastiveObjective(kind)(similarity, posterior, moved, draws=draws)
        optimizer.zero_grad()
        terms["loss"].backward()
        return 0.5 * (terms["plus"] + terms["minus"]) - (terms["entropy"] if kind == "bound" else 0.0)

    before = cost()
    optimizer.step()
    assert (cost() > before) == (kind == "published")


def test_a_gaussian_that_fits_stays_under_the_bound() -> None:
    """For the plain sum of squares the model's images are white noise of variance 1 around the moved one."""
    similarity, posterior = Similarity("ssd", True, 2), ImageGaussian(torch.full((1, 1, 6, 5), 0.5), 0.5, 0.0)
    optimizer, moved = torch.optim.Adam(posterior.parameters(), 0.05), [torch.full((1, 1, 6, 5), 0.4)] * 3
    set_trainable(similarity, False)
    assert similarity.encoder is not None
    similarity.encoder.slope = 1.0
    for _ in range(120):
        posterior.clamp_()
        optimizer.zero_grad()
        ContrastiveObjective("bound")(similarity, posterior, moved)["loss"].backward()
        optimizer.step()
    assert posterior.log_var.detach().exp().mean().item() == pytest.approx(1.0, abs=0.2)


def test_the_profile_is_the_bound_at_the_best_width() -> None:
    """Of a linear network, for one draw: no other width of q_f gives more, and gradients are those of that width."""
    similarity, _ = linear_model()
    fixed, moved = torch.tensor([0.3, 0.8]).view(1, 1, 1, 2), torch.tensor([0.5, 0.4]).view(1, 1, 1, 2)
    draws = ImageGaussian(fixed).draw()

    def loss(kind: str, width: float = 1.0) -> Tensor:
        posterior = ImageGaussian(fixed, sigma=0.1 * width, factor=0.1 * width)
        return ContrastiveObjective(kind)(similarity, posterior, [moved] * 3, draws=draws)["loss"]

    found = loss("profile")
    widths = torch.logspace(-2, 2, 401).tolist()
    bounds = [loss("bound", width).item() for width in widths]
    best = max(range(len(widths)), key=lambda place: bounds[place])
    assert 0 < best < len(widths) - 1
    assert found.item() == pytest.approx(bounds[best], abs=1e-3)
    parameters = [p for p in similarity.parameters() if p.ndim > 1]
    gradients = [torch.autograd.grad(value, parameters) for value in (found, loss("bound", widths[best]))]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.06 * float(other.abs().max()))


def test_the_profile_is_for_squared_differences() -> None:
    posterior, moved = ImageGaussian(images(1, 1, 9, 8)), [images(1, 1, 9, 8)] * 3
    with pytest.raises(ValueError, match="'profile' is for similarity 'ssd'"):
        ContrastiveObjective("profile")(Similarity("lcc", True, 2), posterior, moved)


@pytest.mark.parametrize("masked", [False, True])
def test_under_the_profile_a_network_stops_to_grow(masked: bool) -> None:
    """The energy of real pairs settles at half the number of voxels that count."""
    similarity, posterior = Similarity("ssd", True, 2), ImageGaussian(images(1, 1, 12, 10), factor=0.0)
    mask = torch.rand(1, 1, 12, 10) > 0.5 if masked else None
    moved = [images(1, 1, 12, 10)] * 3
    optimizer = torch.optim.Adam(similarity.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        terms = ContrastiveObjective("profile")(similarity, posterior, moved, mask)
        terms["loss"].backward()
        optimizer.step()
    voxels = 120 if mask is None else int(mask.sum())
    assert terms["model"].item() == pytest.approx(voxels / 2, rel=0.3)


def test_set_trainable() -> None:
    similarity = Similarity("ssd", True, 2)
    for flag in (False, True):
        set_trainable(similarity, flag)
        assert all(p.requires_grad == flag for p in similarity.parameters())


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'bound'.*got 'exact'"):
        ContrastiveObjective("exact")
