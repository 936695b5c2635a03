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

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from common.metrics import NonDiffeomorphicVolumePercent, NonPositiveJacobianPercent, StdLogJacobian


def wavy(amplitude: float) -> torch.Tensor:
    """The field of the published figures on 24 x 30 x 26 voxels."""
    i, j, k = np.meshgrid(np.arange(24), np.arange(30), np.arange(26), indexing="ij")
    turn = 2 * np.pi
    parts = [
        np.sin(turn * j / 11) * np.cos(turn * k / 9),
        np.cos(turn * i / 10 + 0.3),
        np.sin(turn * (i + j) / 13),
    ]
    return amplitude * torch.from_numpy(np.stack(parts))[None].float()


def scaling(factor: float, dims: int = 3, size: int = 9) -> torch.Tensor:
    """The field of ``x -> factor x`` along the first axis."""
    ddf = torch.zeros(1, dims, *(size,) * dims)
    ddf[0, 0] = ((factor - 1) * torch.arange(size)).view(-1, *[1] * (dims - 1))
    return ddf


@pytest.mark.parametrize("amplitude", ["0.5", "1.0", "2.0", "3.0"])
def test_published_figures(shared: Path, amplitude: str) -> None:
    path = shared / "parity" / "dual_stream_pyramid" / "small_refs.json"
    wanted = json.loads(path.read_text())["metrics_field_24x30x26"][amplitude]
    ddf = wavy(float(amplitude))
    measured = {
        "sdlogj_no3": StdLogJacobian(),
        "sdlogj_l2r": StdLogJacobian("learn2reg"),
        "folding_pct_central": NonPositiveJacobianPercent(crop=2),
        "ndv_percent": NonDiffeomorphicVolumePercent(),
    }
    for name, metric in measured.items():
        assert float(metric(ddf)) == pytest.approx(wanted[name], rel=2e-5, abs=1e-6), name
    ones = torch.ones(1, 1, *ddf.shape[2:])
    assert float(NonDiffeomorphicVolumePercent("learn2reg")(ddf, ones)) == pytest.approx(
        wanted["ndv_percent"], rel=2e-5
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_identity_and_translation_are_perfect(dims: int, device: torch.device) -> None:
    ddf = torch.full((2, dims, *(7, 6, 5)[:dims]), 1.7, device=device)
    for metric in (StdLogJacobian(), NonPositiveJacobianPercent(), NonDiffeomorphicVolumePercent()):
        assert metric(ddf).cpu().tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("dims", [2, 3])
def test_a_reflection_folds_everything(dims: int) -> None:
    ddf = scaling(-1.0, dims)
    assert float(NonPositiveJacobianPercent()(ddf)) == 100.0
    assert float(NonDiffeomorphicVolumePercent()(ddf)) == pytest.approx(100.0)


def test_determinant_zero_counts_as_folded() -> None:
    assert float(NonPositiveJacobianPercent()(scaling(0.0))) == 100.0


def test_two_halves() -> None:
    """A determinant of 2 in one half and 1 in the other: half of log 2 is its deviation."""
    ddf = torch.zeros(1, 2, 5, 12)
    ddf[0, 1] = torch.cat([torch.zeros(6), torch.arange(1.0, 7.0)])[None, :]  # steps of 0, then of 1
    mask = torch.ones(1, 1, 5, 12)
    mask[..., 5:7] = 0  # where the central difference mixes both
    value = float(StdLogJacobian(crop=1)(ddf, mask))
    assert value == pytest.approx(math.log(2) / 2, rel=1e-6)
    shifted = float(StdLogJacobian("learn2reg", crop=1)(ddf, mask))
    assert shifted == pytest.approx((math.log(5) - math.log(4)) / 2, rel=1e-6)


def test_learn2reg_against_an_independent_computation() -> None:
    ddf = wavy(2.0)
    field = ddf[0].double().numpy()
    gradient = np.stack([[correlate1d(c, [-0.5, 0, 0.5], axis=a) for a in range(3)] for c in field])
    matrices = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)
    determinant = np.linalg.det(matrices)[2:-2, 2:-2, 2:-2]
    expected = np.log((determinant + 3).clip(1e-9, 1e9)).std()
    assert float(StdLogJacobian("learn2reg")(ddf)) == pytest.approx(expected, rel=1e-6)


def test_masks_and_items() -> None:
    ddf = torch.cat([scaling(-1.0), scaling(1.0)])
    ddf[0, :, :5] = 0
    mask = torch.zeros(2, 1, 9, 9, 9)
    mask[:, :, :3] = 0.4  # anything above 0 counts
    assert NonPositiveJacobianPercent()(ddf, mask).tolist() == [[0.0], [0.0]]
    whole = NonPositiveJacobianPercent()(ddf)
    assert float(whole[0]) > 30 and float(whole[1]) == 0.0
    assert NonDiffeomorphicVolumePercent()(ddf, mask).tolist() == [[0.0], [0.0]]
    empty = torch.zeros(2, 1, 9, 9, 9)
    for metric in (StdLogJacobian(), NonPositiveJacobianPercent(), NonDiffeomorphicVolumePercent()):
        assert torch.isnan(metric(ddf, empty)).all() and torch.isnan(metric.aggregate())


def test_learn2reg_volume_needs_the_moving_image() -> None:
    with pytest.raises(ValueError, match="moving image"):
        NonDiffeomorphicVolumePercent("learn2reg")(scaling(1.0))


@pytest.mark.parametrize(
    ("ddf", "mask", "message"),
    [
        (torch.zeros(1, 2, 6, 6, 6), None, r"\(1, 2, 6, 6, 6\)"),
        (torch.zeros(1, 3, 6, 6, 4), None, "no voxel"),
        (torch.zeros(1, 3, 6, 6, 6), torch.ones(1, 1, 6, 6, 5), r"mask.*\(1, 1, 6, 6, 5\)"),
    ],
)
def test_what_cannot_be_measured_is_named(ddf: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StdLogJacobian()(ddf, mask)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_slabs_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ddf = torch.cat([wavy(2.0), wavy(3.0)])
    mask = torch.rand(2, 1, *ddf.shape[2:]) - 0.3
    metrics = (StdLogJacobian(), NonPositiveJacobianPercent(crop=0), NonDiffeomorphicVolumePercent())
    whole = [metric(ddf, mask) for metric in metrics]
    monkeypatch.setattr("common.metrics.regularity._SLAB_VOXELS", rows * 30 * 26)
    for metric, value in zip(metrics, whole, strict=True):
        torch.testing.assert_close(metric(ddf, mask), value, rtol=1e-6, atol=0)
