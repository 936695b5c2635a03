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
"""Forces against automatic differentiation of the energies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bundles.gradirn.scripts.energies import ENERGIES, build_energy
from bundles.gradirn.scripts.interpolant import value_and_slopes
from common.spatial import identity_grid
from tests.bundles.gradirn.test_interpolant import interpolate

SIZES = [(13, 10), (7, 12, 10)]


def smooth(*shape: int, dtype: torch.dtype) -> Tensor:
    """Images with structure in them, in [0, 1]."""
    grid = identity_grid(shape[2:], dtype=torch.float64)
    phases = 6 * torch.rand(*shape[:2], *(1,) * len(shape[2:]), dtype=torch.float64)
    waves = sum((0.4 + 0.1 * k) * axis for k, axis in enumerate(grid))
    return (0.5 + 0.3 * torch.sin(waves + phases) + 0.2 * torch.rand(shape, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENERGIES)
@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_force_times_slope_is_the_gradient_that_autograd_finds(
    size: tuple[int, ...], name: str, spread: float, dtype: torch.dtype, tolerance: float
) -> None:
    moving, fixed = smooth(2, 1, *size, dtype=dtype), smooth(2, 1, *size, dtype=dtype)
    ddf = (spread * torch.randn(2, len(size), *size, dtype=dtype)).requires_grad_()
    energy = build_energy(name, window=5)
    (expected,) = torch.autograd.grad(energy(interpolate(moving, ddf), fixed) * moving.numel(), ddf)
    moved, slopes = value_and_slopes(moving, ddf.detach())
    gradient = (energy.force(moved, fixed).unsqueeze(2) * slopes).sum(1)
    torch.testing.assert_close(gradient, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("name", ENERGIES)
def test_forces_can_be_differentiated_for_training(name: str) -> None:
    fixed = smooth(2, 1, 6, 5, dtype=torch.float64)
    moved = smooth(2, 1, 6, 5, dtype=torch.float64).requires_grad_()
    energy = build_energy(name, window=3)
    assert torch.autograd.gradcheck(lambda image: energy.force(image, fixed), (moved,), fast_mode=True)


@pytest.mark.parametrize("name", ENERGIES)
def test_forces_do_not_depend_on_the_batch(name: str) -> None:
    moved, fixed = smooth(3, 1, 9, 8, dtype=torch.float64), smooth(3, 1, 9, 8, dtype=torch.float64)
    energy = build_energy(name)
    torch.testing.assert_close(energy.force(moved, fixed)[1:2], energy.force(moved[1:2], fixed[1:2]))


@pytest.mark.parametrize("name", ENERGIES)
def test_equal_and_constant_images_exert_no_force(name: str) -> None:
    image = 10 * smooth(1, 1, 16, 12, dtype=torch.float32)
    energy = build_energy(name)
    assert energy.force(image, image).abs().max() < 1e-4
    flat = torch.full_like(image, 0.7)
    assert energy.force(flat, image).isfinite().all()
    assert energy.force(image, flat).isfinite().all()


def test_correlations_ignore_scale_and_offset() -> None:
    moved, fixed = smooth(1, 1, 16, 12, dtype=torch.float64), smooth(1, 1, 16, 12, dtype=torch.float64)
    energy = build_energy("ncc")
    torch.testing.assert_close(energy.force(moved, 3 * fixed + 2), energy.force(moved, fixed), atol=1e-5, rtol=0)


def test_global_correlation_has_the_published_value() -> None:
    k = torch.arange(36, dtype=torch.float64).view(1, 1, 6, 6)
    value = build_energy("ncc")(torch.sin(0.7 * k), torch.cos(0.5 * k))
    assert value.item() == pytest.approx(-0.003510808, abs=1e-8)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"similarity must be one of .*'lncc'.*got 'mi'"):
        build_energy("mi")
