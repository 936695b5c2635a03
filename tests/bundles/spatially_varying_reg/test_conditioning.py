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
"""Hyper-parameters as a network is told them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from bundles.spatially_varying_reg.scripts.conditioning import Conditioning


def _conditioning() -> Conditioning:
    return Conditioning(alpha=(1.0, 1.2), w=(0.0, 5.0))


def test_published_semantics() -> None:
    """alpha - 1 = 0.2 b and w = 5 r for (b, r) in the unit square."""
    given = torch.tensor([[1.0, 0.0], [1.01, 2.5], [1.2, 5.0]])
    expected = torch.tensor([[0.0, 0.0], [0.05, 0.5], [1.0, 1.0]])
    torch.testing.assert_close(_conditioning().normalised(given), expected, atol=1e-6, rtol=0)


def test_one_number_or_one_an_item() -> None:
    conditioning = _conditioning()
    conditioning.set(alpha=[1.0, 1.1, 1.2], w=2.0)
    torch.testing.assert_close(
        conditioning.values(3, sample=True), torch.tensor([[1.0, 2.0], [1.1, 2.0], [1.2, 2.0]]), atol=1e-6, rtol=0
    )
    with pytest.raises(ValueError, match="alpha was given for 3 items, the batch has 2"):
        conditioning.values(2, sample=False)


def test_what_is_open_is_drawn_in_training_and_mid_range_else() -> None:
    conditioning = _conditioning()
    conditioning.set(w=1.0)
    drawn = conditioning.values(4000, sample=True)
    alpha = drawn[:, 0]
    assert alpha.min() >= 1.0 and alpha.max() <= 1.2 and (drawn[:, 1] == 1.0).all()
    assert len(alpha.unique()) > 3900
    assert alpha.mean().item() == pytest.approx(1.1, abs=4 * 0.2 / math.sqrt(12 * 4000))
    assert alpha.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.05)
    torch.testing.assert_close(conditioning.values(1, sample=False), torch.tensor([[1.1, 1.0]]))
    conditioning.set()
    torch.testing.assert_close(conditioning.values(1, sample=False), torch.tensor([[1.1, 2.5]]))


def test_draws_follow_the_seed() -> None:
    torch.manual_seed(3)
    first = _conditioning().values(5, sample=True)
    torch.manual_seed(3)
    torch.testing.assert_close(_conditioning().values(5, sample=True), first)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": math.nan},
        {"alpha": 0.9},
        {"alpha": -1.0},
        {"alpha": math.inf},
        {"w": -0.1},
        {"w": [1.0, math.nan]},
        {"w": []},
        {"sigma": 0.5},
    ],
)
def test_refusals_change_nothing(values: dict[str, float]) -> None:
    conditioning = _conditioning()
    conditioning.set(alpha=1.1, w=1.0)
    with pytest.raises(ValueError, match=next(iter(values))):
        conditioning.set(**{"alpha": 1.2, **values})
    torch.testing.assert_close(conditioning.values(1, sample=True), torch.tensor([[1.1, 1.0]]))


def test_warns_once_outside_the_range() -> None:
    conditioning = _conditioning()
    with pytest.warns(UserWarning, match=r"alpha \[1.212\] is outside the trained range \[1, 1.2\]"):
        conditioning.set(alpha=1.212, w=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conditioning.set(alpha=1.3)
        _conditioning().set(alpha=torch.tensor(1.2), w=torch.tensor([0.0, 5.0]))  # float32 rounds 1.2 up
    with pytest.warns(UserWarning, match="w"):
        conditioning.set(w=5.4)


@pytest.mark.parametrize("ends", [(1.2, 1.0), (1.0, 1.0), (0.9, 1.2), (1.0,), (1.0, math.inf), (math.nan, 1.2)])
def test_range_is_checked(ends: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="alpha_range"):
        Conditioning(alpha=ends)


def test_given_tensors_are_copied() -> None:
    conditioning, w = _conditioning(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    conditioning.set(w=w)
    w.fill_(3.0)
    torch.testing.assert_close(conditioning.values(2, sample=False)[:, 1], torch.tensor([1.0, 2.0]))
