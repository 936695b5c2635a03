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
"""Variational registration in the place of a network: its fields and its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts.network import VariationalRegistration, published_setting
from common.handlers import load_checkpoint, save_checkpoint
from common.spatial import compose, identity_grid, warp


def pair(*size: int, shift: float = 2.0) -> Tensor:
    """Two blobs in different places, and the same ``shift`` voxels further along the first axis; (1, 2, *size)."""
    grid = identity_grid(size)
    middle = torch.tensor([(n - 1) / 2 for n in size]).view(-1, *(1,) * len(size))

    def picture(offset: float) -> Tensor:
        places = grid - middle
        places[0] -= offset
        radius = places.norm(dim=0)
        return 0.6 * torch.sigmoid(0.3 * min(size) - radius) + 0.4 * torch.sigmoid(0.15 * min(size) - radius)

    return torch.stack((picture(-shift / 2), picture(shift / 2)))[None]


def network_of(dims: int = 2, **options: Any) -> VariationalRegistration:
    return VariationalRegistration(dims, **{"iterations": 60, "learning_rate": 0.03, "steps": 5, **options})


@pytest.mark.parametrize("transformation", ["svf", "bspline"])
@pytest.mark.parametrize("size", [(22, 19), (12, 13, 11)])
def test_fields(transformation: str, size: tuple[int, ...]) -> None:
    dims, image = len(size), pair(*size)
    network = network_of(dims, transformation=transformation, samples=4, inverse=True, levels=(2, 1))
    with torch.no_grad():
        found = network.fields(image)
    shapes = {
        "ddf": (1, dims, *size),
        "velocity": (1, dims, *size),
        "inverse_ddf": (1, dims, *size),
        "energy": (1, 1),
        "ddf_samples": (1, 4, dims, *size),
        "ddf_std": (1, dims, *size),
        "uncertainty": (1, 1, *size),
    }
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
    moving, fixed = image.chunk(2, dim=1)
    assert float((warp(moving, found["ddf"]) - fixed).square().mean()) < 0.35 * float((moving - fixed).square().mean())
    # Content moves to higher indices: the field pulls it from lower ones.
    inside = fixed[:, 0] > 0.7
    assert float(found["ddf"][:, 0][inside].mean()) < -0.8
    residuals = [compose(found["ddf"], back).abs().mean() for back in (found["inverse_ddf"], -found["ddf"])]
    assert float(residuals[0]) < 0.3 * float(residuals[1])
    assert float(found["energy"]) > 0


def test_spread_is_that_of_the_samples() -> None:
    found = network_of(samples=6).fields(pair(14, 15))
    samples = found["ddf_samples"]
    variance = (samples - samples.mean(1, keepdim=True)).square().mean(1)
    torch.testing.assert_close(found["ddf_std"], variance.sqrt())
    torch.testing.assert_close(found["uncertainty"], variance.sum(1, keepdim=True).sqrt())
    assert float(found["uncertainty"].min()) > 0
    # Mirrored at a mean whose field is the ddf, up to what is not linear.
    assert float((samples.mean(1) - found["ddf"]).abs().mean()) < 0.3 * float(found["ddf_std"].mean())


def test_samples_are_free_of_the_fits_noise() -> None:
    """Their uniform noise would be in every voxel; neighbours of a smooth field differ by less."""
    found = network_of(samples=2, noise=3.0, iterations=2).fields(pair(16, 16))
    assert float(found["ddf_samples"].diff(dim=-1).abs().max()) < 1.0


def test_same_pair_same_result() -> None:
    image = pair(15, 14)
    first, second = (network_of(similarity="lcc", iterations=4).fields(image) for _ in range(2))
    torch.randn(3)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)
    other = network_of(similarity="lcc", iterations=4, seed=1).fields(image)
    assert not torch.equal(other["ddf"], first["ddf"])


def test_fewer_outputs() -> None:
    assert set(network_of(samples=0, iterations=1).fields(pair(10, 9))) == {"ddf", "velocity", "energy"}
    assert network_of(samples=0, iterations=1)(pair(10, 9)).shape == (1, 2, 10, 9)
    with pytest.raises(ValueError, match="samples"):
        network_of(samples=1)


@pytest.mark.parametrize(
    ("transformation", "similarity", "weight", "rate", "count"),
    [
        ("svf", "ssd", 1.8, 0.01, 1024),
        ("svf", "lcc", 2.8, 0.02, 1344),
        ("bspline", "ssd", 1.4, 0.01, 1024),
        ("bspline", "lcc", 2.0, 0.01, 1024),
    ],
)
def test_published_settings_are_the_defaults(
    transformation: str, similarity: str, weight: float, rate: float, count: int
) -> None:
    network = VariationalRegistration(similarity=similarity, transformation=transformation)
    regularisation: Any = network.problem.regularisation
    assert (regularisation.weight, network.inner_loop.learning_rate) == (weight, rate)
    assert network.inner_loop.iterations == network.inner_loop.total == count
    assert published_setting(transformation, similarity) == (weight, rate, count)
    assert network.problem.noise == 0.1
    own = VariationalRegistration(weight=0.5, iterations=7, learning_rate=0.3)
    regularisation = own.problem.regularisation
    assert (regularisation.weight, own.inner_loop.iterations, own.inner_loop.learning_rate) == (0.5, 7, 0.3)


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match="ncc"):
        VariationalRegistration(similarity="ncc")
    with pytest.raises(ValueError, match="affine"):
        VariationalRegistration(transformation="affine")


@pytest.mark.parametrize(("learnt", "kernel", "count"), [(False, False, 0), (True, False, 7), (True, True, 8)])
def test_weights_are_those_of_the_similarity(learnt: bool, kernel: bool, count: int, tmp_path: Any) -> None:
    start = network_of(iterations=1)
    network = network_of(similarity="lcc", learnt=learnt, train_lcc_kernel=kernel, start=start)
    state = network.state_dict()
    assert len(state) == count
    assert all(name.startswith("similarity.") for name in state)
    assert network.problem.similarity is network.similarity
    if learnt:
        save_checkpoint(tmp_path / "model.pt", state)
        other = network_of(similarity="lcc", learnt=True, train_lcc_kernel=kernel)
        load_checkpoint(tmp_path / "model.pt", other)
        torch.testing.assert_close(other.problem.similarity.state_dict(), dict(network.similarity.state_dict()))


def test_number_of_weights_in_three_dimensions() -> None:
    """As published: 2,728 for SSD, 27 more with the box of LCC."""
    ssd = VariationalRegistration(learnt=True)
    lcc = VariationalRegistration(similarity="lcc", learnt=True, train_lcc_kernel=True)
    assert [sum(p.numel() for p in n.parameters()) for n in (ssd, lcc)] == [2728, 2755]


def test_begins_as_the_plain_similarity() -> None:
    image = pair(14, 12)
    learnt, plain = (network_of(learnt=flag, iterations=5, samples=0).fields(image)["ddf"] for flag in (True, False))
    torch.testing.assert_close(learnt, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(1, 4, 12, 12), (1, 3, 12, 12), (1, 2, 8, 8, 8)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{shape[1]} channels" if len(shape) == 4 else "shape"):
        network_of(iterations=1).fields(torch.rand(shape))


def test_on_every_device_under_autocast(device: torch.device) -> None:
    network, image = network_of(learnt=True, samples=2, iterations=3).to(device), pair(13, 14).to(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
        found = network.fields(image)
    assert all(v.device.type == device.type and v.dtype == torch.float32 for v in found.values())
