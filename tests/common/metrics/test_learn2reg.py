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

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from common.metrics import learn2reg_labels


def organisers(labels: np.ndarray, ddf: np.ndarray) -> np.ndarray:
    """One label map (*S) and one field (d, *S), by the rule of the challenge's evaluation."""
    identity = np.stack(np.meshgrid(*[np.arange(n) for n in labels.shape], indexing="ij"))
    return map_coordinates(labels, identity + ddf, order=0)


@pytest.mark.parametrize("shape", [(9, 12), (7, 9, 8)])
def test_the_organisers_rule(shape: tuple[int, ...], device: torch.device) -> None:
    random = np.random.RandomState(0)
    labels = random.randint(0, 30, (2, 1, *shape)).astype(np.int32)
    # Quarters of voxels: positions half way between voxels, and on and just beyond the outermost, occur often.
    ddf = random.randint(-12, 13, (2, len(shape), *shape)).astype(np.float32) / 4
    moved = learn2reg_labels(torch.from_numpy(labels).to(device), torch.from_numpy(ddf).to(device))
    assert moved.dtype == torch.int32
    for item in range(2):
        assert np.array_equal(moved[item, 0].cpu().numpy(), organisers(labels[item, 0], ddf[item].astype(np.float64)))


def test_half_a_voxel_and_the_edge() -> None:
    labels = torch.tensor([[[[1, 2, 3]]]])
    ddf = torch.zeros(1, 2, 1, 3)
    ddf[0, 1, 0] = torch.tensor([0.5, -0.5, 0.1])
    assert learn2reg_labels(labels, ddf)[0, 0].tolist() == [[2, 2, 0]]


def test_positions_that_are_no_numbers_are_outside() -> None:
    assert learn2reg_labels(torch.ones(1, 1, 3, 3).int(), torch.full((1, 2, 3, 3), float("nan"))).sum() == 0


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\), got \(1, 2, 4, 5\)"):
        learn2reg_labels(torch.zeros(1, 1, 4, 4).int(), torch.zeros(1, 2, 4, 5))
