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
"""Energies: published figures, the closed gradients against automatic ones, and what they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from bundles.similarity_learning.scripts.encoder import FeatureEncoder
from bundles.similarity_learning.scripts.similarity import KINDS, Similarity
from tests.bundles.similarity_learning.test_encoder import by_layers, saved_bytes

SIZES = [(13, 10), (6, 9, 7)]


@pytest.fixture(scope="module")
def figures(shared: Path) -> dict[str, Tensor]:
    """Arrays made by the published code."""
    arrays = np.load(shared / "parity" / "similarity_learning" / "similarity_networks.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


def published_weights(figures: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What is stored under a name, by our names."""
    found = {"encoder.aggregation.weight": figures[f"{name}.agg.weight"][..., None, None]}
    for layer in range(3):
        for kind in ("weight", "bias"):
            found[f"encoder.convolutions.{layer}.{kind}"] = figures[f"{name}.enc.enc.{layer}.main.{kind}"]
    if f"{name}.kernel.weight" in figures:
        found["kernel"] = figures[f"{name}.kernel.weight"]
    return found


def energy_and_gradient(similarity: Similarity, fixed: Tensor, moved: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    moved = moved.clone().requires_grad_()
    energy = similarity.energy(similarity.reference(fixed, mask), moved)
    return energy.detach(), torch.autograd.grad(energy.sum(), moved)[0]


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """In [0, 1], and smooth enough that neighbours resemble each other."""
    noise = torch.rand(shape, dtype=torch.float64)
    for axis in range(2, len(shape)):
        noise = noise + noise.roll(1, axis)
    return (noise / noise.max()).to(dtype)


def random_similarity(kind: str, spatial_dims: int, **options: Any) -> Similarity:
    """With weights of about 1 in its network."""
    similarity = Similarity(kind, spatial_dims=spatial_dims, **options)
    for conv in (
        [] if similarity.encoder is None else [*similarity.encoder.convolutions, similarity.encoder.aggregation]
    ):
        conv.reset_parameters()
    if similarity.kernel is not None:
        torch.nn.init.uniform_(similarity.kernel, 0.5, 1.5)
    return similarity


def the_published_way(kind: str, fixed: Tensor, moved: Tensor, network: FeatureEncoder | None) -> Tensor:
    """The voxelwise map written out from the published description, both images encoded."""
    f, m = (image if network is None else by_layers(network, image) for image in (fixed, moved))
    if kind == "ssd":
        return (f - m) ** 2
    axes = f.ndim - 2
    ones, convolve = f.new_ones(1, 1, *(3,) * axes), F.conv2d if axes == 2 else F.conv3d

    def total(x: Tensor) -> Tensor:
        return convolve(F.pad(x, (1,) * 2 * axes, mode="replicate"), ones)

    f, m = f - total(f) / 3**axes, m - total(m) / 3**axes
    return total(f * m) ** 2 / (total(f**2) * total(m**2) + 1e-5)


@pytest.mark.parametrize(("kind", "window", "name"), [("ssd", 1, "SSD"), ("lcc", 1, "LCC_s1"), ("lcc", 2, "LCC_s2")])
def test_plain_energies_have_the_published_values(
    figures: dict[str, Tensor], kind: str, window: int, name: str
) -> None:
    similarity = Similarity(kind, window=window)
    reference = similarity.reference(figures["fixed"], figures["mask"])
    energy = similarity.energy(reference, figures["moving"])
    torch.testing.assert_close(energy, figures[name], rtol=1e-5, atol=0)
    if f"z_{name}" in figures:
        z = similarity.map(reference, figures["moving"])[figures["mask"]]
        torch.testing.assert_close(z, figures[f"z_{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_new_networks_have_the_published_values(figures: dict[str, Tensor], kind: str) -> None:
    similarity = Similarity(kind, learnt=True, train_lcc_kernel=kind == "lcc")
    data = [figures[name] for name in ("fixed", "moving", "mask")]
    energy, gradient = energy_and_gradient(similarity, *data)
    torch.testing.assert_close(energy, figures[f"{kind}_init_loss"], rtol=1e-5, atol=0)
    expected = figures[f"{kind}_init_dM"]
    # Where the image is 0 the leaky ReLU's slope hangs on the random 1e-7. Elsewhere nothing is random, unless such a
    # voxel has a part in the window.
    apart = F.max_pool3d((figures["moving"] == 0).float(), 5, 1, 2) == 0
    assert apart.float().mean() > 0.3
    assert (gradient - expected)[apart].abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_any_network_has_the_published_values_and_gradients(figures: dict[str, Tensor], kind: str) -> None:
    similarity = Similarity(kind, learnt=True, train_lcc_kernel=kind == "lcc")
    data = [figures[name] for name in ("fixed", "moving", "mask")]
    if similarity.kernel is not None:
        # The published gradient of the box has that of the new network's energy in it, which was not set to zero.
        similarity.energy(similarity.reference(*data[::2]), data[1]).sum().backward()
        start = similarity.kernel.grad
        similarity.zero_grad(set_to_none=True)
        similarity.kernel.grad = start
    similarity.load_state_dict(published_weights(figures, f"{kind}_rand"))
    reference = similarity.reference(*data[::2])
    torch.testing.assert_close(reference.fixed, figures[f"{kind}_rand_zfixed"], rtol=1e-5, atol=1e-5)
    similarity.energy(reference, data[1]).sum().backward()
    for name, expected in published_weights(figures, f"{kind}_rand_grad").items():
        gradient = similarity.get_parameter(name).grad
        assert gradient is not None
        assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()
    # Frozen, energies and gradients take another way.
    similarity.requires_grad_(False)
    energy, gradient = energy_and_gradient(similarity, *data)
    torch.testing.assert_close(energy, figures[f"{kind}_rand_loss"], rtol=1e-5, atol=0)
    expected = figures[f"{kind}_rand_dM"]
    assert (gradient - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_changes_nothing(kind: str, size: tuple[int, ...]) -> None:
    fixed, moved = images(1, 1, *size), images(2, 1, *size)
    plain, learnt = (Similarity(kind, learnt, len(size)) for learnt in (False, True))
    energies = [similarity.energy(similarity.reference(fixed), moved) for similarity in (plain, learnt)]
    torch.testing.assert_close(energies[1], energies[0], rtol=1e-5, atol=0)
    maps = [similarity.map(similarity.reference(fixed), moved) for similarity in (plain, learnt)]
    torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "weighted lcc"])
def test_closed_gradients_are_automatic_ones(kind: str, size: tuple[int, ...], window: int, masked: bool) -> None:
    similarity = random_similarity(kind[-3:], len(size), window=window, train_lcc_kernel=len(kind) > 3)
    similarity.double().requires_grad_(False)
    fixed = images(2, 1, *size, dtype=torch.float64)
    moved = images(4, 1, *size, dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 1, *size) > 0.3 if masked else None
    reference = similarity.reference(fixed, mask)
    z = similarity.map(reference, moved) * (torch.cat((mask, mask)) if mask is not None else 1.0)
    expected = (0.5 if kind == "ssd" else -1.0) * z.flatten(1).sum(1)
    energy = similarity.energy(reference, moved)
    torch.testing.assert_close(energy, expected)
    weights = torch.rand(4, dtype=torch.float64)
    (slope,) = torch.autograd.grad(expected, moved, weights)
    torch.testing.assert_close(torch.autograd.grad(energy, moved, weights)[0], slope, rtol=1e-9, atol=1e-12)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", [False, True])
def test_maps_are_the_published_ones(kind: str, learnt: bool) -> None:
    similarity = random_similarity(kind, 3, learnt=learnt)
    fixed, moved = images(1, 1, 8, 6, 7), images(1, 1, 8, 6, 7)
    expected = the_published_way(kind, fixed, moved, similarity.encoder)
    torch.testing.assert_close(similarity.map(similarity.reference(fixed), moved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_has_an_energy_of_its_own(kind: str) -> None:
    """Blocks of a batch meet their own fixed images and masks, whatever else is in the batch."""
    similarity = random_similarity(kind, 2, learnt=True).requires_grad_(False)
    fixed, moved, mask = images(3, 1, 9, 8), images(6, 1, 9, 8), torch.rand(3, 1, 9, 8) > 0.4
    together = similarity.energy(similarity.reference(fixed, mask), moved)
    alone = [similarity.energy(similarity.reference(fixed[n : n + 1], mask[n : n + 1]), moved[n::3]) for n in range(3)]
    torch.testing.assert_close(together.view(2, 3), torch.stack(alone, dim=1))
    shared = similarity.energy(similarity.reference(fixed[:1], mask[:1]), moved)
    torch.testing.assert_close(shared[::3], together[::3])
    assert (shared[1::3] / together[1::3] - 1).abs().min() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_energies_do_not_hang_on_the_size_when_normalised(kind: str) -> None:
    fixed, moved, mask = images(2, 1, 9, 8), images(4, 1, 9, 8), torch.rand(2, 1, 9, 8) > 0.4
    sums, means = (Similarity(kind, spatial_dims=2, normalised=flag) for flag in (False, True))
    count = mask.flatten(1).sum(1).repeat(2)
    expected = sums.energy(sums.reference(fixed, mask), moved) / count
    torch.testing.assert_close(means.energy(means.reference(fixed, mask), moved), expected)
    expected = sums.energy(sums.reference(fixed), moved) / 72
    torch.testing.assert_close(means.energy(means.reference(fixed), moved), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", [False, True])
def test_an_empty_mask_costs_nothing(kind: str, learnt: bool) -> None:
    similarity, image = Similarity(kind, learnt, 2, normalised=True), images(1, 1, 9, 8)
    energy, gradient = energy_and_gradient(similarity, image, images(2, 1, 9, 8), torch.zeros(1, 1, 9, 8))
    assert torch.equal(energy, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros(2, 1, 9, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_data_of_images_are_dropped(kind: str) -> None:
    similarity, fixed, moved = Similarity(kind, True, 2), images(1, 1, 9, 8), images(2, 1, 9, 8)
    expected = similarity.energy(similarity.reference(fixed, fixed > 0.3), moved)
    reference = similarity.reference(MetaTensor(fixed), MetaTensor(fixed > 0.3))
    found = similarity.energy(reference, MetaTensor(moved))
    assert type(found) is Tensor
    assert type(reference.mask) is Tensor
    assert torch.equal(found, expected)


def test_correlation_is_at_most_one_and_ignores_contrast() -> None:
    """-z is -1 a voxel for a fixed image that is a multiple of the moved one."""
    similarity, fixed = Similarity("lcc", spatial_dims=2), torch.rand(1, 1, 12, 11)
    same = similarity.map(similarity.reference(fixed), 0.2 + 0.7 * fixed)
    assert same.max() <= 1.0
    assert same.min() > 0.98
    moved = torch.rand(1, 1, 12, 11)
    other = similarity.map(similarity.reference(fixed), moved)
    assert other.mean() < 0.5
    torch.testing.assert_close(similarity.map(similarity.reference(fixed), 1 - moved), other, atol=1e-4, rtol=0)


def test_flat_images_are_finite_and_exert_no_force() -> None:
    similarity = Similarity("lcc", spatial_dims=2)
    for fixed, moved in (
        (torch.zeros(1, 1, 8, 8), torch.rand(1, 1, 8, 8)),
        (torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8)),
    ):
        energy, gradient = energy_and_gradient(similarity, fixed, moved, torch.ones(1, 1, 8, 8))
        assert energy.abs().max() < 1e-4
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixed_image_is_encoded_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = Similarity(kind, learnt=True, spatial_dims=2)
    seen: list[int] = []
    assert similarity.encoder is not None
    similarity.encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    reference = similarity.reference(images(1, 1, 8, 8))
    for _ in range(3):
        similarity.energy(reference, images(2, 1, 8, 8))
    assert seen == [1, 2, 2, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learnt", [False, True])
def test_little_is_kept_for_the_backward_pass(kind: str, learnt: bool) -> None:
    """One map of gradients and the signs of features, where the published way keeps all that it computes."""
    similarity = Similarity(kind, learnt).requires_grad_(False)
    fixed, moved = images(1, 1, 12, 10, 14), images(2, 1, 12, 10, 14).requires_grad_()
    reference = similarity.reference(fixed)
    _, ours = saved_bytes(lambda image: similarity.energy(reference, image), moved)
    assert ours <= moved.numel() * (4 + 20 * learnt) + learnt * 4 * 2728
    # One sample at a time, as there.
    theirs = sum(
        saved_bytes(lambda image: the_published_way(kind, fixed, image, similarity.encoder).sum(), moved[k : k + 1])[1]
        for k in range(2)
    )
    if learnt or kind == "lcc":
        assert theirs > 2 * ours


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_both_images_and_the_network(kind: str) -> None:
    """As the contrastive step needs them, with a fixed image that is a sample."""
    similarity = random_similarity(kind, 2, learnt=True).double()
    fixed = images(1, 1, 6, 5, dtype=torch.float64).requires_grad_()
    moved = images(2, 1, 6, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, m: similarity.energy(similarity.reference(f), m), (fixed, moved), fast_mode=True
    )
    similarity.energy(similarity.reference(fixed), moved).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in similarity.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_full_precision_under_autocast(kind: str, device: torch.device) -> None:
    similarity = Similarity(kind, learnt=True).to(device).requires_grad_(False)
    fixed, moved = images(1, 1, 12, 10, 14).to(device), images(2, 1, 12, 10, 14).to(device).requires_grad_()
    exact = similarity.energy(similarity.reference(fixed), moved)
    (slope,) = torch.autograd.grad(exact.sum(), moved)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = similarity.energy(similarity.reference(fixed), moved)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)
    (gradient,) = torch.autograd.grad(rounded.sum(), moved)
    assert (gradient - slope).norm() < 0.1 * slope.norm()
    with torch.autocast(device.type, torch.bfloat16):
        plain = Similarity(kind)
        found = plain.energy(plain.reference(fixed), moved)
    torch.testing.assert_close(found, plain.energy(plain.reference(fixed), moved), rtol=0, atol=0)


def test_the_state_is_that_of_the_learnt_parts() -> None:
    assert not Similarity("lcc").state_dict()
    assert sum(p.numel() for p in Similarity("ssd", learnt=True).parameters()) == 2728
    similarity = Similarity("lcc", learnt=True, train_lcc_kernel=True)
    assert sum(p.numel() for p in similarity.parameters()) == 2755
    assert similarity.kernel is not None
    assert (similarity.kernel == 1).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*'lcc'.*got 'ncc'"):
        Similarity("ncc")
    with pytest.raises(ValueError, match="train_lcc_kernel is an option of kind 'lcc', but the kind is 'ssd'"):
        Similarity("ssd", train_lcc_kernel=True)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Similarity("lcc", window=0)
    similarity = Similarity("ssd", spatial_dims=2)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 8, 7\), which does not fit images \(1, 1, 8, 8\)"):
        similarity.reference(torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 7))
    reference = similarity.reference(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"moved images \(3, 1, 8, 8\) are no blocks of fixed ones \(2, 1, 8, 8\)"):
        similarity.energy(reference, torch.rand(3, 1, 8, 8))
    with pytest.raises(ValueError, match="no blocks"):
        similarity.energy(reference, torch.rand(2, 1, 8, 9))
