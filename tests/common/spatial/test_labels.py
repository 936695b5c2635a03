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
"""Label maps against an explicit one-hot map, warped linearly."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from common.spatial import labels as module
from common.spatial import warp, warp_labels


def shares(labels: torch.Tensor, ddf: torch.Tensor, count: int, padding: str) -> torch.Tensor:
    """The warped one-hot map (B, count, *S); what comes from outside belongs to label 0."""
    warped = warp(one_hot(labels[:, 0].long(), count).movedim(-1, 1).double(), ddf, padding=padding)
    warped[:, 0] += 1 - warped.sum(1)
    return warped


@pytest.mark.parametrize(("moving", "fixed"), [((9, 11), (9, 11)), ((7, 6, 9), (7, 6, 9)), ((5, 8, 6), (6, 5, 9))])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16])
def test_equals_the_argmax_of_a_one_hot_map(moving, fixed, padding, dtype, device):
    labels = torch.randint(0, 4, (2, 1, *moving), device=device).to(dtype)
    ddf = 2 * torch.randn(2, len(fixed), *fixed, device=device)
    moved = warp_labels(labels, ddf, padding=padding)
    assert moved.shape == (2, 1, *fixed) and moved.dtype == dtype and moved.device == labels.device
    share = shares(labels, ddf, 4, padding)
    first, second = share.topk(2, dim=1).values.unbind(1)
    clear = first - second > 1e-4  # nearer than that, rounding decides
    assert clear.float().mean() > 0.95
    assert torch.equal(moved[:, 0].long()[clear], share.argmax(1)[clear])


def test_chunks_join_without_a_seam(monkeypatch):
    labels, ddf = torch.randint(0, 9, (2, 1, 7, 5, 6)), 2 * torch.randn(2, 3, 7, 5, 6)
    whole = warp_labels(labels, ddf)
    monkeypatch.setattr(module, "_CHUNK_CPU", 2 * 5 * 6)
    assert torch.equal(warp_labels(labels, ddf), whole)


def test_several_corners_of_one_label_win_together():
    """Three corners of label 7 with 3/4 beat one of label 1; and two of label 7 (0.5) beat 1 and 2 (0.25 each)."""
    ddf = torch.full((1, 2, 2, 2), 0.5)
    assert warp_labels(torch.tensor([[[[1, 7], [7, 7]]]]), ddf)[0, 0, 0, 0] == 7
    assert warp_labels(torch.tensor([[[[1, 7], [2, 7]]]]), ddf)[0, 0, 0, 0] == 7
    assert warp_labels(torch.tensor([[[[1, 7], [1, 7]]]]), ddf)[0, 0, 0, 0] == 1


@pytest.mark.parametrize("values", [[3, 5], [5, 3], [-4, 2], [2, -4]])
def test_the_lowest_label_wins_a_tie(values):
    """Half-way between two labels."""
    labels = torch.tensor(values).view(1, 1, 2, 1)
    ddf = torch.zeros(1, 2, 2, 1)
    ddf[:, 0] = 0.5
    assert warp_labels(labels, ddf)[0, 0, 0, 0] == min(values)


def test_outside_is_label_zero_or_the_border():
    labels = torch.full((1, 1, 4, 4, 4), 9, dtype=torch.int32)
    ddf = torch.zeros(1, 3, 4, 4, 4)
    ddf[:, 1] = 3.25
    assert (warp_labels(labels, ddf) == 9).all()
    moved = warp_labels(labels, ddf, padding="zeros")
    assert (moved[:, :, :, 0] == 9).sum() == 16 * (0.25 < 0.5)  # reaches 3.25: three quarters of the last voxel
    assert (moved[:, :, :, 1:] == 0).all()
    assert (warp_labels(labels, ddf + 100, padding="zeros") == 0).all()


def test_zero_field_keeps_every_label_however_large_or_low():
    labels = torch.randint(-(2**62), 2**62, (1, 1, 5, 6, 7))
    for padding in ("border", "zeros"):
        assert torch.equal(warp_labels(labels, torch.zeros(1, 3, 5, 6, 7), padding=padding), labels)


def test_masks_and_slices():
    mask = torch.rand(1, 1, 1, 6, 6) > 0.5
    moved = warp_labels(mask, torch.zeros(1, 3, 1, 6, 6))
    assert moved.dtype == torch.bool and torch.equal(moved, mask)


def test_half_precision_field_is_used_in_float32():
    labels = torch.arange(300).view(1, 1, 300, 1)
    ddf = torch.zeros(1, 2, 300, 1, dtype=torch.bfloat16)
    ddf[:, 0] = 1
    assert torch.equal(warp_labels(labels, ddf)[0, 0, :-1, 0], torch.arange(1, 300))


def test_errors():
    with pytest.raises(ValueError, match="float32"):
        warp_labels(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\) for ddf \(1, 2, 4, 4\)"):
        warp_labels(torch.zeros(1, 3, 4, 4, dtype=torch.int64), torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) and \(1, 2, 4, 4\)"):
        warp_labels(torch.zeros(2, 1, 4, 4, dtype=torch.int64), torch.zeros(1, 2, 4, 4))
