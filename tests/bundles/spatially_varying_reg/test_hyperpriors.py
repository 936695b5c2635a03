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
"""The losses against the published figures, and the best weight map against gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.spatially_varying_reg.scripts.hyperpriors import (
    SMALLEST,
    BetaHyperprior,
    GaussianHyperprior,
    SpatiallyWeightedDiffusion,
    local_energy,
    optimal_weight_map,
)
from common.losses import LNCC, Diffusion, WeightedLosses
from common.metrics import NonDiffeomorphicVolumePercent, NonPositiveJacobianPercent
from common.spatial import integrate, warp

SIZES = [(7, 6), (6, 5, 4)]
PAIRINGS = ["edge", "upper"]


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """The inputs of the published figures."""
    draw = np.random.RandomState(0)
    size = (20, 24, 28)
    arrays = {
        "fixed": draw.rand(1, 1, *size),
        "moved": draw.rand(1, 1, *size),
        "flow": 2 * draw.standard_normal((1, 3, *size)),
        "weight": draw.rand(1, 1, *size),
    }
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def test_published_similarities(published: dict[str, Tensor]) -> None:
    fixed, moved = published["fixed"], published["moved"]
    summed, mean = LNCC(form="sum"), LNCC(form="mean")
    assert float(summed(fixed, moved)) == pytest.approx(-0.178281859, rel=1e-5)
    assert float(summed(fixed, (fixed + moved) / 2)) == pytest.approx(-0.668001294, rel=1e-5)
    assert float(mean(fixed, moved)) == pytest.approx(-0.178103343, rel=1e-5)


def test_published_priors(published: dict[str, Tensor]) -> None:
    assert float(BetaHyperprior(1.175)(published["weight"])) == pytest.approx(0.174535185, rel=1e-5)
    assert float(GaussianHyperprior(0.525)(published["weight"])) == pytest.approx(0.174839914, rel=1e-5)


def test_published_penalties(published: dict[str, Tensor]) -> None:
    flow, weight = published["flow"], published["weight"]
    squares = SpatiallyWeightedDiffusion(1.0, weight_at="upper")
    assert float(squares(flow, weight)) == pytest.approx(3.99816537, rel=1e-5)
    assert float(SpatiallyWeightedDiffusion(1.0, "l1", weight_at="upper")(flow, weight)) == pytest.approx(
        1.1286813, rel=1e-5
    )
    assert float(squares(flow)) == pytest.approx(7.98654413, rel=1e-5)
    assert float(SpatiallyWeightedDiffusion(1.0)(flow)) == pytest.approx(7.98654413, rel=1e-5)
    assert float(SpatiallyWeightedDiffusion(3.35, weight_at="upper")(flow, weight)) == pytest.approx(
        3.35 * 3.99816537, rel=1e-5
    )


def test_published_warp_and_integration(published: dict[str, Tensor]) -> None:
    moved = warp(published["fixed"], published["flow"], padding="zeros")
    assert float(moved.double().sum()) == pytest.approx(5403.07849, rel=1e-5)
    field = integrate(published["flow"], 7, padding="zeros").double()
    assert float(field.sum()) == pytest.approx(81.1791373, rel=1e-4)
    assert float(field.abs().mean()) == pytest.approx(0.544311375, rel=1e-5)
    assert float(field.abs().max()) == pytest.approx(2.85293484, rel=1e-5)


def test_published_folding(published: dict[str, Tensor]) -> None:
    volume, count = NonDiffeomorphicVolumePercent(), NonPositiveJacobianPercent()
    assert float(volume(0.25 * published["flow"])) == pytest.approx(14.438816, rel=1e-5)
    assert float(count(0.25 * published["flow"])) == pytest.approx(2.622378, rel=1e-5)
    assert float(volume(published["flow"])) == pytest.approx(1136.475424, rel=1e-5)
    reflection = torch.zeros(1, 3, 20, 24, 28)
    reflection[:, 0] = (19.0 - 2.0 * torch.arange(20.0)).view(20, 1, 1)
    assert float(volume(reflection)) == pytest.approx(100.0, rel=1e-6)


def test_priors_by_hand() -> None:
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0]).view(1, 1, 2, 2)
    logarithms = [0.0, np.log(0.5), np.log(SMALLEST), 0.0]
    assert float(BetaHyperprior(1.2)(weights)) == pytest.approx(-0.2 * np.mean(logarithms), rel=1e-6)
    assert float(GaussianHyperprior(0.4)(weights)) == pytest.approx(0.4 * (0.25 + 1 + 1) / 4, rel=1e-5)
    assert float(GaussianHyperprior(1.0)(torch.full((1, 1, 2, 2), 9.0))) == 16.0


def test_the_penalty_by_hand_and_in_millimetres() -> None:
    ddf = torch.zeros(1, 2, 2, 2)
    ddf[0, 0, 1] = 3.0
    weights = torch.tensor([[0.2, 0.4], [0.6, 1.0]]).view(1, 1, 2, 2)
    # Two differences of 9 along axis 0 and none else: mean over 2 components and 2 places, then over 2 axes.
    assert float(SpatiallyWeightedDiffusion(2.0, weight_at="upper")(ddf, weights)) == pytest.approx(2 * 9 * 1.6 / 4 / 2)
    assert float(SpatiallyWeightedDiffusion(2.0)(ddf, weights)) == pytest.approx(2 * 9 * (0.4 + 0.7) / 4 / 2)
    mm = SpatiallyWeightedDiffusion(2.0, spacing=(4.0, 1.0))(ddf, weights)
    assert float(mm) == pytest.approx(2 * 9 * 1.1 / 4 / 2), "4 mm an entry over 4 mm"
    ddf = ddf.transpose(2, 3)
    along_the_other = SpatiallyWeightedDiffusion(1.0, spacing=(4.0, 1.0))(ddf)
    assert float(along_the_other) == pytest.approx(16 * float(SpatiallyWeightedDiffusion(1.0)(ddf)))


@pytest.mark.parametrize("size", SIZES)
def test_flipping_an_image_changes_nothing_but_the_published_pairing(size: tuple[int, ...]) -> None:
    ddf, weights = torch.randn(1, len(size), *size), torch.rand(1, 1, *size)
    edge, upper = SpatiallyWeightedDiffusion(), SpatiallyWeightedDiffusion(weight_at="upper")
    torch.testing.assert_close(edge(ddf.flip(2), weights.flip(2)), edge(ddf, weights))
    assert abs(float(upper(ddf.flip(2), weights.flip(2)) / upper(ddf, weights)) - 1) > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_gradients(size: tuple[int, ...]) -> None:
    ddf = torch.randn(2, len(size), *size, dtype=torch.float64, requires_grad=True)
    weights = (0.05 + 0.9 * torch.rand(2, 1, *size, dtype=torch.float64)).requires_grad_()
    strength = torch.tensor([0.7, 3.1], dtype=torch.float64, requires_grad=True)
    for pairing in PAIRINGS:
        penalty = SpatiallyWeightedDiffusion(spacing=tuple(range(1, len(size) + 1)), weight_at=pairing)
        assert torch.autograd.gradcheck(penalty, (ddf, weights, strength), fast_mode=True)
    assert torch.autograd.gradcheck(lambda w: SpatiallyWeightedDiffusion()(ddf.detach(), None, w), (strength,))
    for prior in (BetaHyperprior(), GaussianHyperprior()):
        assert torch.autograd.gradcheck(prior, (weights, 1 + strength), fast_mode=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_of_settings_is_the_mean_of_each_by_itself(size: tuple[int, ...]) -> None:
    ddf, weights = torch.randn(3, len(size), *size), torch.rand(3, 1, *size)
    alphas, ws = torch.tensor([1.0, 1.1, 1.3]), torch.tensor([0.0, 2.0, 5.0])
    penalty, beta, gaussian = SpatiallyWeightedDiffusion(), BetaHyperprior(), GaussianHyperprior()
    for per_item, single in (
        (
            penalty(ddf, weights, ws),
            lambda k: SpatiallyWeightedDiffusion(float(ws[k]))(ddf[k : k + 1], weights[k][None]),
        ),
        (penalty(ddf, None, ws), lambda k: SpatiallyWeightedDiffusion(float(ws[k]))(ddf[k : k + 1])),
        (beta(weights, alphas), lambda k: BetaHyperprior(float(alphas[k]))(weights[k : k + 1])),
        (gaussian(weights, ws), lambda k: GaussianHyperprior(float(ws[k]))(weights[k : k + 1])),
    ):
        torch.testing.assert_close(per_item, torch.stack([single(k) for k in range(3)]).mean())
    torch.testing.assert_close(penalty(ddf, weights, torch.tensor(2.0)), SpatiallyWeightedDiffusion(2.0)(ddf, weights))
    torch.testing.assert_close(penalty(ddf, weights, 2.0), SpatiallyWeightedDiffusion(2.0)(ddf, weights))
    best = optimal_weight_map(ddf, ws, alpha=alphas)
    one_by_one = [optimal_weight_map(ddf[k : k + 1], float(ws[k]), alpha=float(alphas[k])) for k in range(3)]
    torch.testing.assert_close(best, torch.cat(one_by_one))


def energy_by_hand(ddf: np.ndarray, weight_at: str, spacing: tuple[float, ...]) -> np.ndarray:
    """The squared differences at each voxel, axis by axis, with N / (N - 1) for the places an axis has."""
    dims, size = ddf.shape[0], ddf.shape[1:]
    total = np.zeros(size)
    scaled = ddf * np.asarray(spacing).reshape(-1, *[1] * dims)
    for axis in range(dims):
        step = np.diff(scaled, axis=axis + 1) / spacing[axis]
        squares = (step**2).sum(0) * size[axis] / (size[axis] - 1) / dims**2
        nothing = [(0, 0)] * dims
        before, after = list(nothing), list(nothing)
        before[axis], after[axis] = (1, 0), (0, 1)
        to_lower, to_upper = np.pad(squares, before), np.pad(squares, after)
        total += to_lower if weight_at == "upper" else (to_lower + to_upper) / 2
    return total


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight_at", PAIRINGS)
def test_the_energy_of_each_voxel_by_hand(size: tuple[int, ...], weight_at: str) -> None:
    ddf = torch.randn(2, len(size), *size, dtype=torch.float64)
    spacing = (1.5, 0.7, 3.15)[: len(size)]
    found = local_energy(ddf, spacing=spacing, weight_at=weight_at)
    expected = np.stack([energy_by_hand(item.numpy(), weight_at, spacing) for item in ddf])[:, None]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(found.mean(), Diffusion(spacing=spacing)(ddf))
    best = optimal_weight_map(ddf, 3.35, alpha=1.175, spacing=spacing, weight_at=weight_at).numpy()
    np.testing.assert_allclose(best, 0.175 / np.maximum(0.175, 3.35 * expected), rtol=1e-12)
    best = optimal_weight_map(ddf, 0.2, sigma=0.525, spacing=spacing, weight_at=weight_at).numpy()
    np.testing.assert_allclose(best, np.maximum(SMALLEST, 1 - 0.2 * expected / 1.05), rtol=1e-12)


def descend(ddf: Tensor, prior: Any, penalty: Any, sigmoid: bool) -> Tensor:
    """A free weight map by gradient descent, as the sigmoid of logits or clamped after each step."""
    free = torch.full((len(ddf), 1, *ddf.shape[2:]), 0.0 if sigmoid else 0.5, dtype=ddf.dtype, requires_grad=True)
    if sigmoid:
        # Where the best weight is 1 its logit is infinite, and a plain step shrinks as the sigmoid flattens.
        optimizer: torch.optim.Optimizer = torch.optim.Adam([free], lr=0.2, betas=(0.9, 0.9))
    else:
        optimizer = torch.optim.SGD([free], lr=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [250, 400] if sigmoid else [], gamma=0.1)
    for _ in range(500):
        optimizer.zero_grad()
        weights = torch.sigmoid(free) if sigmoid else free
        ((penalty(ddf, weights) + prior(weights)) * weights.numel()).backward()
        optimizer.step()
        schedule.step()
        if not sigmoid:
            free.data.clamp_(SMALLEST, 1.0)
    return (torch.sigmoid(free) if sigmoid else free).detach()


@pytest.mark.parametrize("sigmoid", [True, False], ids=["logits", "clamped"])
@pytest.mark.parametrize("weight_at", PAIRINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_gradient_descent_on_a_free_map_ends_at_the_closed_form(
    size: tuple[int, ...], weight_at: str, name: str, sigmoid: bool
) -> None:
    torch.manual_seed(1)
    spacing, w = (1.0, 1.3, 0.8)[: len(size)], 2.0
    ddf = torch.randn(1, len(size), *size, dtype=torch.float64)
    energy = local_energy(ddf, spacing=spacing, weight_at=weight_at)
    # So that the smallest weight is 1/8 in either case, and some are 1 under the Beta prior.
    setting, largest = ({"alpha": 1.3}, 8 * 0.3) if name == "alpha" else ({"sigma": 0.45}, 7 / 8 * 0.9)
    ddf = ddf * (largest / (w * energy.max())) ** 0.5
    prior = BetaHyperprior(1.3) if name == "alpha" else GaussianHyperprior(0.45)
    penalty = SpatiallyWeightedDiffusion(w, spacing=spacing, weight_at=weight_at)
    expected = optimal_weight_map(ddf, w, spacing=spacing, weight_at=weight_at, **setting)
    assert float(expected.min()) == pytest.approx(1 / 8) and float(expected.std()) > 0.08
    found = descend(ddf, prior, penalty, sigmoid)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_best_map_of_extremes() -> None:
    still, torn = torch.zeros(1, 2, 6, 6), torch.randn(1, 2, 6, 6) * 1e4
    for setting in ({"alpha": 1.175}, {"sigma": 0.5}, {"alpha": 1.0}, {"sigma": 0.0}):
        assert torch.equal(optimal_weight_map(still, 3.35, **setting), torch.ones(1, 1, 6, 6))
        assert float(optimal_weight_map(torn, 3.35, **setting).max()) < 1e-5
        assert torch.equal(optimal_weight_map(torn, 0.0, **setting), torch.ones(1, 1, 6, 6))
    with torch.no_grad():
        assert not optimal_weight_map(torn.requires_grad_(), 1.0, alpha=1.1).requires_grad


def test_half_precision_loses_nothing(device: torch.device) -> None:
    ddf = torch.randn(2, 3, 6, 5, 7, device=device)
    weights, ws = torch.rand(2, 1, 6, 5, 7, device=device), torch.tensor([1.0, 3.0], device=device)
    penalty, beta, gaussian = SpatiallyWeightedDiffusion(), BetaHyperprior(), GaussianHyperprior()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = [penalty(ddf, weights, ws), beta(weights, 1 + ws), gaussian(weights), local_energy(ddf)]
    expected = [penalty(ddf, weights, ws), beta(weights, 1 + ws), gaussian(weights), local_energy(ddf)]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)
    assert beta(torch.zeros(1, 1, 4, 4, device=device).bfloat16()).isfinite()


def test_the_terms_of_a_config() -> None:
    losses = WeightedLosses(
        {
            "smoothness": {"term": SpatiallyWeightedDiffusion(), "inputs": ["ddf", "weight_map", "w"]},
            "prior": {"term": BetaHyperprior(), "inputs": ["weight_map", "alpha"]},
        }
    )
    values = {"ddf": torch.randn(2, 2, 5, 6), "weight_map": torch.rand(2, 1, 5, 6)}
    total, named = losses({**values, "w": torch.tensor([1.0, 2.0]), "alpha": torch.tensor([1.1, 1.2])})
    torch.testing.assert_close(total, named["smoothness"] + named["prior"])


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha must be a number of at least 1, got 0\.9"):
        BetaHyperprior(0.9)
    with pytest.raises(ValueError, match="sigma must be"):
        GaussianHyperprior(float("nan"))
    with pytest.raises(ValueError, match="w must be"):
        SpatiallyWeightedDiffusion(-1.0)
    with pytest.raises(ValueError, match="weight_at"):
        SpatiallyWeightedDiffusion(weight_at="lower")
    ddf, weights = torch.zeros(3, 2, 4, 4), torch.ones(3, 1, 4, 4)
    with pytest.raises(ValueError, match="one for each of 3 items, got 2"):
        SpatiallyWeightedDiffusion()(ddf, weights, torch.ones(2))
    with pytest.raises(ValueError, match="one for each of 3 items, got 2"):
        BetaHyperprior()(weights, torch.ones(2))
    with pytest.raises(ValueError, match=r"\(B, 1, \*S\), got shape \(3, 2, 4, 4\)"):
        BetaHyperprior()(ddf)
    with pytest.raises(ValueError, match="either alpha or sigma"):
        optimal_weight_map(ddf, 1.0)
    with pytest.raises(ValueError, match="either alpha or sigma"):
        optimal_weight_map(ddf, 1.0, alpha=1.1, sigma=0.3)
