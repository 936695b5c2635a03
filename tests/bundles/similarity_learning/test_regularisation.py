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
"""The energy of differences: values by hand, finite differences, the published figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bundles.similarity_learning.scripts.regularisation import DifferenceEnergy
from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing


def test_values_by_hand() -> None:
    velocity = torch.zeros(2, 2, 3, 2)
    velocity[0, 0] = torch.tensor([[0.0, 1.0], [2.0, 5.0], [2.0, 6.0]])
    # Along the first axis 2, 0 and 4, 1; along the second 1, 3, 4.
    assert DifferenceEnergy(2.0)(velocity).tolist() == [21.0 + 26.0, 0.0]
    # The last ones of each axis, 0 and 1, and 1, 3, 4, count twice.
    assert DifferenceEnergy(2.0, edge_weight=2)(velocity).tolist() == [21.0 + 1.0 + 2 * 26.0, 0.0]
    assert DifferenceEnergy(2.0, edge_weight=0)(velocity).tolist() == [20.0, 0.0]


@pytest.mark.parametrize("edge_weight", [1.0, 2.0])
@pytest.mark.parametrize("size", [(4, 3), (3, 1, 4), (2, 3, 3)])
def test_gradients_are_those_of_finite_differences(size: tuple[int, ...], edge_weight: float) -> None:
    velocity = torch.randn(2, len(size), *size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(DifferenceEnergy(1.3, edge_weight), (velocity,))


def test_images_have_energies_of_their_own(device: torch.device) -> None:
    velocity = torch.randn(3, 3, 5, 6, 4, device=device)
    energy = DifferenceEnergy()
    torch.testing.assert_close(energy(velocity), torch.cat([energy(image[None]) for image in velocity]))


def test_sums_are_made_in_float32_under_autocast() -> None:
    velocity = torch.randn(1, 3, 20, 20, 20)
    plain = DifferenceEnergy()(velocity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DifferenceEnergy()(velocity), plain)
        half = DifferenceEnergy()(velocity.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, plain, rtol=1e-2, atol=0)


def test_published_energy_and_gradient(shared: Path) -> None:
    known = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(_file(shared)).items()}
    velocity = known["v"].flip(1).requires_grad_()
    energy = DifferenceEnergy(float(known["w_reg"]), edge_weight=2)
    torch.testing.assert_close(energy(velocity), known["reg_v"], rtol=1e-5, atol=0)
    smooth = SobolevSmoothing()(velocity)
    torch.testing.assert_close(energy(smooth), known["reg_smoothed"], rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(energy(velocity).sum(), velocity)
    torch.testing.assert_close(gradient.flip(1), known["reg_grad"], rtol=1e-5, atol=1e-4)


def _file(shared: Path) -> Path:
    return shared / "parity/similarity_learning/sobolev_reg_entropy.npz"
