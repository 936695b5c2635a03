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

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bundles.dual_stream_pyramid.scripts.composition import (
    MATCHES,
    AttentionStep,
    CompositionDecoder,
    ConvolutionStep,
    enlarge,
    match_channels,
)
from common.networks import FlowHead, local_correlation, slabs
from common.spatial import compose, warp


class _Constant(nn.Module):
    """The same step in every voxel; remembers what it was shown."""

    def __init__(self, *step: float) -> None:
        super().__init__()
        self.step = torch.tensor(step)

    def compare(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        return moving, fixed

    def predict(self, moving: Tensor, fixed: Tensor) -> Tensor:
        self.moving = moving
        shape = (1, -1) + (1,) * (fixed.ndim - 2)
        return self.step.view(shape).expand(len(fixed), -1, *fixed.shape[2:])


def _features(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(1, 2, *size) for size in sizes]


def test_a_step_counts_double_on_every_finer_level() -> None:
    features = _features((8, 8), (4, 4), (2, 2))
    decoder = CompositionDecoder([_Constant(0.25, 0), _Constant(1, 0), _Constant(0, -1)])
    found = decoder(features, features, (8, 8), pyramid=True)
    expected = [torch.tensor([0.0, -4.0]), torch.tensor([2.0, -4.0]), torch.tensor([2.25, -4.0])]
    for stage, values in zip(found["pyramid"], expected, strict=True):
        torch.testing.assert_close(stage, values.view(1, 2, 1, 1).expand(1, 2, 8, 8))
    assert found["ddf"] is found["pyramid"][-1]
    assert set(decoder(features, features, (8, 8))) == {"ddf"}


def test_a_step_sees_the_features_moved_by_the_field_so_far() -> None:
    features = _features((6, 8), (3, 4))
    fine = _Constant(0, 0)
    CompositionDecoder([fine, _Constant(1, 0)])(features, features, (6, 8))
    torch.testing.assert_close(fine.moving[:, :, :4], features[0][:, :, 2:])


def test_the_new_step_comes_first_and_the_old_field_is_looked_up_where_it_leads() -> None:
    class _Wave(nn.Module):
        def compare(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, ...]:
            return (fixed,)

        def predict(self, fixed: Tensor) -> Tensor:
            size = fixed.shape[2:]
            return torch.sin(torch.arange(2.0 * size.numel())).view(1, 2, *size)

    features = _features((6, 8), (3, 4))
    found = CompositionDecoder([_Wave(), _Wave()])(features, features, (6, 8), pyramid=True)
    step = _Wave().predict(features[0])
    torch.testing.assert_close(found["ddf"], compose(found["pyramid"][0], step))


def test_features_coarser_than_the_image_do() -> None:
    features = _features((4, 4), (2, 2))
    ddf = CompositionDecoder([_Constant(0, 1), _Constant(0, 0)])(features, features, (8, 12))["ddf"]
    torch.testing.assert_close(ddf[0, 1], torch.full((8, 12), 3.0))


def test_parity_of_the_enlargement(shared: Path) -> None:
    arrays = np.load(shared / "parity/dual_stream_pyramid/resize_flow.npz")
    given, expected = torch.from_numpy(arrays["inp"]), torch.from_numpy(arrays["out"])
    torch.testing.assert_close(enlarge(given, expected.shape[2:]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("match", sorted(MATCHES))
@pytest.mark.parametrize(("size", "radius"), [((5, 4), 2), ((3, 4, 3), 1)])
def test_what_a_head_sees(match: str, size: tuple[int, ...], radius: int) -> None:
    moving, fixed = torch.randn(2, 1, 3, *size)
    expected = {
        "mf": [moving, fixed],
        "c": [local_correlation(fixed, moving, radius)],
        "mfc": [moving, local_correlation(fixed, moving, radius), fixed],
    }[match]
    seen = torch.cat(MATCHES[match](moving, fixed, radius), dim=1)
    torch.testing.assert_close(seen, torch.cat(expected, dim=1))
    assert seen.shape[1] == match_channels(match, 3, radius, len(size))


def test_attention_points_at_where_the_content_is() -> None:
    step = AttentionStep(2, 4, 4)
    nn.init.dirac_(step.projection.weight)
    nn.init.zeros_(step.projection.bias)
    fixed = 20 * F.normalize(torch.randn(1, 4, 8, 8))  # of equal length, so that each fits itself best
    shift = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    moving = warp(fixed, -shift)  # what is at x in fixed is at x + shift in moving
    inside = step(moving, fixed)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, shift[..., 2:-2, 2:-2], atol=0.1, rtol=0)
    assert step(moving, fixed).abs().max() <= 1


@pytest.mark.parametrize("size", [(9, 12), (7, 5, 6)])
@pytest.mark.parametrize("step", [*sorted(MATCHES), "attention"])
def test_by_slabs_it_is_the_same(size: tuple[int, ...], step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dims, channels = len(size), (3, 5)
    made = [
        AttentionStep(dims, c, c) if step == "attention" else ConvolutionStep(dims, c, 8, match=step) for c in channels
    ]
    for head in (module for one in made for module in one.modules() if isinstance(module, FlowHead)):
        nn.init.normal_(head.conv.weight, std=0.02)
    decoder = CompositionDecoder(made)
    moving, fixed = ([torch.randn(2, c, *(-(-n // 2**k) for n in size)) for k, c in enumerate(channels)] for _ in "mf")
    with torch.no_grad():
        whole = decoder(moving, fixed, size)["ddf"]
        assert len(moving) == len(fixed) == 2
        monkeypatch.setattr(slabs, "_CPU_SLAB", 60)  # of one row
        by_slabs = decoder(moving, fixed, size, release=True)["ddf"]
    torch.testing.assert_close(by_slabs, whole, rtol=0, atol=1e-5)
    assert moving == fixed == []


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="match must be one of"):
        ConvolutionStep(2, 4, 8, match="dot")
    with pytest.raises(ValueError, match="2 levels need as many maps, got 1 and 1"):
        CompositionDecoder([_Constant(0, 0)] * 2)(*[_features((4, 4))] * 2, (4, 4))
