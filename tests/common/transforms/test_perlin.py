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
"""The noise primitive."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from common.transforms.perlin import PerlinLattice, fade, isotropic_gradients, lattice_shape, perlin


def random_lattice(count: int, size: tuple[int, ...], cell: float, seed: int = 0) -> PerlinLattice:
    g = torch.Generator().manual_seed(seed)
    dims = len(size)
    gradients = isotropic_gradients(torch.randn(count, dims, *lattice_shape(size, cell), generator=g))
    return PerlinLattice(
        gradients, torch.zeros(count), torch.full((count, dims), cell), torch.rand(count, dims, generator=g)
    )


def noise_by_definition(lattice: PerlinLattice, item: int, x: tuple[float, ...]) -> float:
    """Perlin's own recipe: the ramps of the 2^d corners of the cell, blended by fade(t)."""
    p = [x[k] / float(lattice.cells[item, k]) + float(lattice.phases[item, k]) for k in range(len(x))]
    total = float(lattice.values[item])
    for corner in itertools.product((0, 1), repeat=len(x)):
        t = [v - math.floor(v) for v in p]
        node = tuple(math.floor(v) + c for v, c in zip(p, corner, strict=True))
        ramp = sum((t[k] - corner[k]) * float(lattice.gradients[(item, k, *node)]) for k in range(len(x)))
        for k, c in enumerate(corner):
            f = 6 * t[k] ** 5 - 15 * t[k] ** 4 + 10 * t[k] ** 3
            ramp *= f if c else 1 - f
        total += ramp
    return total


@pytest.mark.parametrize(("t", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.25, 0.103515625)])
def test_fade_values(t: float, expected: float) -> None:
    assert float(fade(torch.tensor(t))) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("size", [(13, 9), (7, 11, 10)])
def test_equals_the_definition(size: tuple[int, ...]) -> None:
    lattice = random_lattice(3, size, 4.3)._replace(values=torch.tensor([0.0, 0.5, -1.0]))
    noise = perlin(lattice, [torch.arange(n).float() for n in size])
    rng = np.random.default_rng(0)
    for _ in range(40):
        item, x = int(rng.integers(3)), tuple(int(rng.integers(n)) for n in size)
        assert float(noise[(item, *x)]) == pytest.approx(noise_by_definition(lattice, item, x), abs=1e-5)


def test_zero_at_nodes_and_slope_of_the_gradient_there() -> None:
    lattice = random_lattice(2, (17, 17), 4.0)._replace(phases=torch.zeros(2, 2))
    step = 1e-2
    axis = torch.arange(4) * 4.0
    at = perlin(lattice, [axis, axis])
    assert float(at.abs().max()) < 1e-6
    beside = perlin(lattice, [axis + step, axis])
    slope = beside / (step / 4.0)
    assert torch.allclose(slope, lattice.gradients[:, 0, :4, :4], atol=1e-3)


def test_slabs_join() -> None:
    lattice = random_lattice(2, (12, 8, 9), 5.0)
    axes = [torch.arange(n).float() for n in (12, 8, 9)]
    whole = perlin(lattice, axes)
    parts = torch.cat([perlin(lattice, [part, *axes[1:]]) for part in axes[0].split(5)], dim=1)
    assert torch.allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradients_are_isotropic_unit_vectors(dims: int) -> None:
    g = isotropic_gradients(torch.randn(20000, dims, 1, generator=torch.Generator().manual_seed(1)))[..., 0]
    assert torch.allclose(g.norm(dim=1), torch.ones(20000), atol=1e-5)
    covariance = g.T @ g / len(g)
    # The polar angles of the published generator give 1/4, 1/4, 1/2 in 3-D.
    assert torch.allclose(covariance, torch.eye(dims) / dims, atol=0.01)


def test_wrong_number_of_axes_is_named() -> None:
    with pytest.raises(ValueError, match=r"2 axes.*for 3"):
        perlin(random_lattice(1, (8, 8), 4.0), [torch.arange(4.0)] * 3)


@pytest.mark.parametrize("extent", [0.0, 3.9, 4.0, 63.0])
def test_lattice_covers_every_phase(extent: float) -> None:
    nodes = lattice_shape([extent], 4.0)[0]
    assert math.floor(extent / 4.0 + 0.999999) + 1 <= nodes - 1
