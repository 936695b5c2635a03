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
"""What samples of a field say of labels and displacements."""

from __future__ import annotations

import math

import pytest
import torch

from bundles.similarity_learning.scripts.posterior import LowRankGaussian
from bundles.similarity_learning.scripts.uncertainty import (
    displacement_std,
    label_disagreement,
    label_entropy,
    label_probabilities,
    label_std,
    total_std,
)
from common.spatial import warp_labels


def shifts(*steps: float, size: tuple[int, ...] = (9, 7)) -> torch.Tensor:
    """Samples (1, K, d, *size) that move everything along the first axis."""
    samples = torch.zeros(1, len(steps), len(size), *size)
    for k, step in enumerate(steps):
        samples[:, k, 0] = step
    return samples


def test_the_spread_of_mirrored_samples_is_that_of_the_distribution() -> None:
    """Divided by their number, not by one less: their mean is known."""
    torch.manual_seed(1)
    found = []
    for _ in range(400):
        posterior = LowRankGaussian.initial(1, (6, 5), 2, sigma=0.3, factor=0.4)
        found.append(displacement_std(posterior.samples(4).detach()).square())
    assert float(torch.stack(found).mean()) == pytest.approx(0.3**2 + 0.4**2, rel=0.05)


def test_displacements_of_1_and_3_voxels() -> None:
    std = displacement_std(shifts(1.0, 3.0))
    assert torch.equal(std[:, 0], torch.ones(1, 9, 7)) and not std[:, 1].any()


@pytest.mark.parametrize("size", [(4, 5), (4, 5, 3)])
def test_the_total_counts_every_axis_in_its_own_spacing(size: tuple[int, ...]) -> None:
    dims = len(size)
    std = torch.arange(1.0, dims + 1).view(1, dims, *[1] * dims).expand(2, dims, *size)
    assert torch.allclose(total_std(std), torch.tensor(sum(k * k for k in range(1, dims + 1)) ** 0.5))
    spacing = torch.tensor([[1.0, 0.5, 2.0][:dims], [3.0, 0.5, 2.0][:dims]], dtype=torch.float64)
    expected = [math.sqrt(a * a + 1 + (36 if dims == 3 else 0)) for a in (1, 3)]
    assert torch.allclose(total_std(std, spacing).flatten(1)[:, 0], torch.tensor(expected))


@pytest.mark.parametrize("size", [(9, 7), (9, 7, 5)])
def test_probabilities_are_the_share_of_samples(size: tuple[int, ...]) -> None:
    label = torch.zeros(1, 1, *size, dtype=torch.int32)
    label[:, :, 4:6], label[:, :, 6] = 7, 3
    # Row r comes from row r + shift.
    shares = label_probabilities(label, shifts(0.0, 0.0, 1.0, -1.0, size=size), [3, 7])
    rows = shares.flatten(3)[0, ..., 0]
    assert rows[0].tolist() == [0, 0, 0, 0, 0, 0.25, 0.5, 0.25, 0]
    assert rows[1].tolist() == [0, 0, 0, 0.25, 0.75, 0.75, 0.25, 0, 0]
    certain = label_probabilities(label, shifts(0.0, 0.0, size=size), [3, 7])
    assert torch.equal(certain[:, 1], (label[:, 0] == 7).float())
    assert not label_std(certain).any() and not label_entropy(certain).any()


def test_std_and_entropy_of_known_probabilities() -> None:
    shares = torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.2, 0.3], [0.25, 0.0]]).T.reshape(1, 2, 2, 2)
    std, entropy = (f(shares).flatten().tolist() for f in (label_std, label_entropy))
    # A single label against the background: the standard deviation of a coin.
    assert std == pytest.approx([0, 0.5, math.sqrt((1 - 0.04 - 0.09 - 0.25) / 2), math.sqrt(0.25 * 0.75)], abs=1e-6)
    of_three = -sum(p * math.log(p) for p in (0.2, 0.3, 0.5))
    of_coin = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy == pytest.approx([0, math.log(2), of_three, of_coin], abs=1e-6)


def test_disagreement_is_the_same_without_a_map_for_each_label() -> None:
    label = torch.randint(0, 4, (1, 1, 9, 7), dtype=torch.int32)
    samples = torch.randn(1, 5, 2, 9, 7)
    moved = torch.cat([warp_labels(label, sample) for sample in samples.unbind(1)])
    expected = label_std(label_probabilities(label, samples, [1, 2, 3]))
    torch.testing.assert_close(label_disagreement(moved), expected[0], atol=1e-6, rtol=0)


def test_samples_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"K of at least 2, got \(1, 1, 2, 9, 7\)"):
        displacement_std(shifts(0.0))
    with pytest.raises(ValueError, match=r"got \(1, 3, 9, 7\)"):
        label_probabilities(torch.zeros(1, 1, 9, 7, dtype=torch.int32), torch.zeros(1, 3, 9, 7), [1])
