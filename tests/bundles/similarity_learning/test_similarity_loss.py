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
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.similarity_loss import SimilarityLoss
from common.handlers import CheckpointError
from common.losses import WeightedLosses


def _checkpoint(path: Path, similarity: Similarity, inside: str | None = None) -> Path:
    state = {f"similarity.{name}": value for name, value in similarity.state_dict().items()}
    torch.save({inside: state} if inside else state, path)
    return path


def _trained(kind: str = "ssd", **options: object) -> Similarity:
    """A network that does not compare the images themselves any more."""
    similarity = Similarity(kind, learnt=True, spatial_dims=2, **options)  # type: ignore[arg-type]
    for parameter in similarity.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return similarity


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 1, 13, 11), torch.rand(2, 1, 13, 11)


def test_half_of_the_mean_squared_difference_inside_the_mask(pair: tuple[Tensor, Tensor]) -> None:
    moved, fixed = pair
    mask = torch.rand(2, 1, 13, 11) > 0.6
    squares = 0.5 * (moved - fixed) ** 2
    loss = SimilarityLoss(spatial_dims=2)
    assert loss(moved, fixed).item() == pytest.approx(squares.mean().item(), rel=1e-5)
    expected = torch.stack([squares[i][mask[i]].mean() for i in range(2)]).mean()
    assert loss(moved, fixed, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(moved, fixed, mask.int()).item() == pytest.approx(expected.item(), rel=1e-5)


def test_local_correlation_is_best_for_equal_images(pair: tuple[Tensor, Tensor]) -> None:
    moved, fixed = pair
    loss = SimilarityLoss("lcc", spatial_dims=2)
    assert -1 <= loss(fixed, fixed) < -0.9 < loss(moved, fixed) < 0


@pytest.mark.parametrize("kind", ["ssd", "lcc"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_an_untrained_network_is_the_baseline(kind: str, spatial_dims: int) -> None:
    moved, fixed = torch.rand(2, 1, 1, *(9, 8, 7)[:spatial_dims])
    plain = SimilarityLoss(kind, spatial_dims=spatial_dims)(moved, fixed)
    learnt = SimilarityLoss(kind, True, spatial_dims=spatial_dims)(moved, fixed)
    assert learnt.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("inside", [None, "model"])
def test_a_learnt_similarity_is_loaded_and_stays(
    pair: tuple[Tensor, Tensor], inside: str | None, tmp_path: Path
) -> None:
    moved, fixed = pair
    similarity = _trained()
    loss = SimilarityLoss("ssd", True, _checkpoint(tmp_path / "x.pt", similarity, inside), spatial_dims=2)
    expected = similarity.energy(similarity.reference(fixed), moved).mean() / (13 * 11)
    moved.requires_grad_()
    found = loss(moved, fixed)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert moved.grad is not None and moved.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in loss.parameters())


def test_a_checkpoint_of_another_similarity_is_refused(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path / "x.pt", _trained("lcc", train_lcc_kernel=True))
    with pytest.raises(CheckpointError, match=r"x\.pt holds no similarity of this kind: .*'kernel'"):
        SimilarityLoss("ssd", True, path, spatial_dims=2)
    with pytest.raises(CheckpointError, match="number of axes"):
        SimilarityLoss("lcc", True, path, spatial_dims=3, train_lcc_kernel=True)
    SimilarityLoss("lcc", True, path, spatial_dims=2, train_lcc_kernel=True)
    torch.save({"unet.weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"it has \['unet\.weight'\]"):
        SimilarityLoss("ssd", True, path, spatial_dims=2)
    with pytest.raises(ValueError, match="no effect unless learnt"):
        SimilarityLoss("ssd", False, path, spatial_dims=2)


def test_it_is_a_term_of_the_weighted_sum(pair: tuple[Tensor, Tensor]) -> None:
    moved, fixed = pair
    mask = torch.ones(2, 1, 13, 11, dtype=torch.bool)
    term = SimilarityLoss(spatial_dims=2)
    losses = WeightedLosses({"similarity": {"term": term, "inputs": ["moved", "fixed", "fixed_mask"], "weight": 2}})
    total, named = losses({"moved": moved, "fixed": fixed, "fixed_mask": mask})
    assert total.item() == pytest.approx((moved - fixed).square().mean().item(), rel=1e-5)
    assert set(named) == {"similarity"}
