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
"""GraDIRN as a whole: its size, its gradients, its options, and what it does before any training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from bundles.gradirn.scripts.baseline import VoxelMorphBaseline
from bundles.gradirn.scripts.energies import ENERGIES, build_energy
from bundles.gradirn.scripts.network import GraDIRN
from common.spatial import identity_grid, jacobian_determinant, warp

UPDATES = ("additive", "diffeomorphic")


def smooth_pair(*size: int, motion: float = 2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A blob on waves, and the same seen through a smooth motion of about ``motion`` voxels: (1, 2, *size)."""
    grid = [axis / max(1, n - 1) for axis, n in zip(identity_grid(size, dtype=torch.float64), size, strict=True)]
    shifts = [torch.sin(3 * grid[(k + 1) % len(size)] + k + 0.5) * motion / max(1, n - 1) for k, n in enumerate(size)]

    def picture(places: list[Tensor]) -> Tensor:
        blob = torch.exp(-sum((place - 0.5) ** 2 for place in places) / 0.06)  # type: ignore[arg-type]
        return (0.4 + 0.5 * blob + 0.1 * torch.sin(6 * places[0]) * torch.cos(5 * places[1])).to(dtype)

    moving = picture([place + shift for place, shift in zip(grid, shifts, strict=True)])
    return torch.stack([moving, picture(grid)]).unsqueeze(0)


def error(pair: Tensor, ddf: Tensor | None = None) -> float:
    """Mean squared difference, after warping if there is a field."""
    moving, fixed = pair.chunk(2, dim=1)
    return (fixed - (moving if ddf is None else warp(moving, ddf))).square().mean().item()


def randomised(network: GraDIRN, scale: float = 0.1) -> GraDIRN:
    """The network as if trained: last layers that are not zero."""
    for steps in network.levels:
        for step in steps:
            torch.nn.init.normal_(step.regulariser.last.weight, std=scale)
    return network


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (88_521, 269_964)),
        ({"images": "implicit"}, (88_521, 269_964)),
        ({"images": "none"}, (86_793, 264_780)),
        ({"shared": False}, (265_563, 809_892)),
        ({"use_similarity": False}, (88_518, 269_961)),
        ({"use_regulariser": False}, (3, 3)),
    ],
)
def test_parameter_counts(options: dict[str, Any], counts: tuple[int, int]) -> None:
    for spatial_dims, count in zip((2, 3), counts, strict=True):
        assert sum(p.numel() for p in GraDIRN(spatial_dims, **options).parameters()) == count


def test_parameter_counts_of_the_baseline() -> None:
    for spatial_dims, count in ((2, 106_866), (3, 320_419)):
        assert sum(p.numel() for p in VoxelMorphBaseline(spatial_dims).parameters()) == count


@pytest.mark.parametrize("size", [(19, 22), (17, 9, 12)])
def test_the_baseline_takes_any_size(size: tuple[int, ...], device: torch.device) -> None:
    ddf = VoxelMorphBaseline(len(size)).to(device)(torch.rand(2, 2, *size, device=device))
    assert ddf.shape == (2, len(size), *size) and ddf.dtype == torch.float32
    assert 0 < ddf.abs().max() < 0.01


@pytest.mark.parametrize("similarity", ENERGIES)
@pytest.mark.parametrize(("size", "update"), [((9, 7), "additive"), ((5, 4, 6), "additive"), ((9, 7), "diffeomorphic")])
def test_gradients_of_the_whole_network(similarity: str, size: tuple[int, ...], update: str) -> None:
    network = GraDIRN(
        len(size), similarity=similarity, levels=2, steps=(1, 2), channels=3, layers=3, update=update, window=3
    )
    randomised(network).double()
    names, values = zip(*network.named_parameters(), strict=True)
    pair = torch.rand(2, 2, *size, dtype=torch.float64, requires_grad=True)

    def call(image: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(network, dict(zip(names, parameters, strict=True)), (image,))

    assert torch.autograd.gradcheck(call, (pair, *values), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("similarity", ENERGIES)
@pytest.mark.parametrize("size", [(64, 48), (33, 47), (24, 30, 27)])
@pytest.mark.parametrize("update", UPDATES)
def test_before_training_it_already_aligns(similarity: str, size: tuple[int, ...], update: str) -> None:
    pair = smooth_pair(*size)
    with torch.inference_mode():
        found = GraDIRN(len(size), similarity=similarity, update=update, pyramid=True).fields(pair)
    moving, fixed = pair.chunk(2, dim=1)
    energy = build_energy(similarity)
    values = [energy(moving, fixed).item()] + [energy(warp(moving, ddf), fixed).item() for ddf in found["pyramid"]]
    assert values == sorted(values, reverse=True), values
    assert error(pair, found["ddf"]) < (0.95 if similarity == "ssd" else 0.8) * error(pair)


@pytest.mark.parametrize("similarity", ENERGIES)
@pytest.mark.parametrize("size", [(64, 48), (24, 30, 27)])
def test_before_training_it_stays_small_even_on_noise(similarity: str, size: tuple[int, ...]) -> None:
    assert GraDIRN(len(size), similarity=similarity)(torch.rand(1, 2, *size)).abs().max() < 8.0


def test_before_training_it_is_plain_gradient_descent() -> None:
    pair = smooth_pair(20, 17)
    plain = GraDIRN(2, use_regulariser=False)(pair)
    assert plain.abs().max() > 0.1
    assert torch.equal(GraDIRN(2)(pair), plain)
    by_hand = torch.zeros(1, 2, 20, 17, requires_grad=True)
    for _ in range(3):
        moving, fixed = pair.chunk(2, dim=1)
        (gradient,) = torch.autograd.grad((warp(moving, by_hand) - fixed).square().sum(), by_hand)
        by_hand = (by_hand - 0.25 * gradient).detach().requires_grad_()
    single = GraDIRN(2, levels=1, steps=3, step_size=0.25)(pair)
    # PyTorch's own sampler rounds whole positions to either side, where the slope has two values.
    assert (single - by_hand).abs().mean() < 0.02 * by_hand.abs().mean()


@pytest.mark.parametrize("images", ["explicit", "implicit", "none"])
@pytest.mark.parametrize("use_similarity", [True, False])
def test_regularisers_see_what_was_chosen(images: str, use_similarity: bool) -> None:
    network = randomised(GraDIRN(2, images=images, use_similarity=use_similarity, levels=2))
    for steps in network.levels:
        for step in steps:
            torch.nn.init.constant_(step.regulariser.last.bias, 0.1)
    pair, other = torch.rand(1, 2, 12, 9), torch.rand(1, 2, 12, 9)
    depends = not torch.equal(network(pair), network(other))
    assert depends == (use_similarity or images != "none")
    network(pair).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_step_sizes() -> None:
    network = GraDIRN(2, steps=(1, 2, 3), shared=False)
    assert [len(steps) for steps in network.levels] == [1, 2, 3]
    assert all(step.step_size.item() == pytest.approx(5 / 7) for steps in network.levels for step in steps)
    fixed = GraDIRN(2, step_size=0.3, learn_step_size=False)
    assert not any(step.tau.requires_grad for steps in fixed.levels for step in steps)
    assert fixed.levels[0][0].step_size.item() == pytest.approx(0.3)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("size", [(18, 13), (10, 9, 11)])
def test_checkpointing_changes_nothing_but_memory(update: str, size: tuple[int, ...]) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = randomised(GraDIRN(len(size), checkpointing=checkpointing, update=update, channels=4, layers=3))
        ddf = network(smooth_pair(*size))
        ddf.square().sum().backward()
        results.append([ddf.detach(), *(p.grad for p in network.parameters())])
    for kept, again in zip(*results, strict=True):
        torch.testing.assert_close(again, kept)
    assert all(gradient.any() for gradient in results[0])


def test_inference_differentiates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, pair = randomised(GraDIRN(2)), smooth_pair(16, 14)
    trained = network(pair).detach()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("automatic differentiation at inference")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch, "enable_grad", refuse)
    with torch.inference_mode():
        found = network.fields(pair)
    assert list(found) == ["ddf"]
    torch.testing.assert_close(found["ddf"].clone(), trained)


@pytest.mark.parametrize("size", [(5, 3), (1, 9), (37, 16), (7, 5, 9), (1, 6, 5)])
def test_any_size_and_every_level(size: tuple[int, ...], device: torch.device) -> None:
    network = GraDIRN(len(size), pyramid=True, similarity="lncc").to(device)
    found = network.fields(torch.rand(2, 2, *size, device=device))
    assert [tuple(ddf.shape) for ddf in found["pyramid"]] == [(2, len(size), *size)] * 3
    assert torch.equal(found["pyramid"][-1], found["ddf"]) and found["ddf"].isfinite().all()


def test_several_channels_count_together() -> None:
    pair = smooth_pair(20, 18)
    twice = pair.repeat_interleave(2, dim=1)
    once = GraDIRN(2, step_size=0.2)(pair)
    torch.testing.assert_close(GraDIRN(2, in_channels=4, step_size=0.1)(twice), once)


def test_autocast_reaches_the_convolutions_only(device: torch.device) -> None:
    network, pair = randomised(GraDIRN(2), scale=0.01).to(device), smooth_pair(24, 20).to(device)
    exact = network(pair)
    with torch.autocast(device.type, torch.bfloat16):
        rough = network(pair)
        plain = GraDIRN(2, use_regulariser=False).to(device)(pair)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    assert torch.equal(plain, GraDIRN(2, use_regulariser=False).to(device)(pair))
    rough.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_diffeomorphic_steps_do_not_fold() -> None:
    pair = smooth_pair(40, 36, motion=4.0) + 0.05 * torch.rand(1, 2, 40, 36)
    options: dict[str, Any] = {"similarity": "ncc", "step_size": 0.5, "use_regulariser": False}
    folds = [
        (jacobian_determinant(GraDIRN(2, update=update, **options)(pair)) <= 0).float().mean().item()
        for update in UPDATES
    ]
    assert folds[0] > 0.005 and folds[1] == 0, folds


def test_nothing_of_the_image_size_is_saved() -> None:
    network = GraDIRN(2)
    assert not dict(network.named_buffers())
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "mi"}, "similarity must be one of"),
        ({"images": "both"}, "images must be one of"),
        ({"update": "svf"}, "update must be one of"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"steps": [1, 2]}, "steps needs"),
        ({"use_similarity": False, "use_regulariser": False}, "no step would change the field"),
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraDIRN(**options)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match="image has 4 channels; the network was built for 2"):
        GraDIRN(2)(torch.rand(1, 4, 8, 8))
    with pytest.raises(ValueError, match="2-D network"):
        GraDIRN(2)(torch.rand(1, 2, 8, 8, 8))
