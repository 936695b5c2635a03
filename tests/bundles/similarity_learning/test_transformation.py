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
"""Transformations against the published arrays, transposed convolutions and the definition of a B-spline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.similarity_learning.scripts.smoothing import SobolevSmoothing
from bundles.similarity_learning.scripts.transformation import (
    BSplineVelocity,
    StationaryVelocity,
    build_transformation,
)
from common.spatial import integrate, warp
from common.spatial.jacobian import determinant


@pytest.fixture
def known(shared: Path) -> dict[str, Tensor]:
    file = np.load(shared / "parity/similarity_learning/transformations.npz")
    return {key: torch.from_numpy(np.asarray(value)) for key, value in file.items()}


def basis(t: float) -> float:
    """The cubic B-spline of the specification."""
    t = abs(t)
    return 2 / 3 + (t / 2 - 1) * t**2 if t < 1 else max(2 - t, 0) ** 3 / 6


def transposed(points: Tensor, spacing: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The published way: a transposed convolution along each axis, then a crop."""
    for axis, (c, n) in enumerate(zip(spacing, size, strict=True), 2):
        taps = torch.tensor([basis((i - (2 * c - 1)) / c) for i in range(4 * c - 1)], dtype=points.dtype)
        rows = points.movedim(axis, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        dense = F.conv_transpose1d(flat, taps.view(1, 1, -1), stride=c, padding=2 * c - 1)[..., c : c + n]
        points = dense.reshape(*rows.shape[:-1], n).movedim(-1, axis)
    return points


@pytest.mark.parametrize(
    ("size", "spacing"), [((9, 12), 2), ((10, 7, 13), (2, 3, 4)), ((6, 5), (1, 5)), ((128, 2), 4), ((1, 4), 2)]
)
def test_splines_are_transposed_convolutions(size: tuple[int, ...], spacing: Any, device: torch.device) -> None:
    transformation = BSplineVelocity(spacing)
    lattice = transformation.lattice(size)
    values = torch.randn(2, len(size), *lattice)
    spacings = (spacing,) * len(size) if isinstance(spacing, int) else spacing
    found = transformation.dense(values.to(device), size).cpu()
    torch.testing.assert_close(found, transposed(values, spacings, size), atol=1e-6, rtol=1e-5)


def test_a_control_point_acts_where_its_spline_does() -> None:
    transformation = BSplineVelocity((2, 3))
    values = torch.zeros(1, 2, *transformation.lattice((9, 10)))
    values[0, 1, 2, 3] = 1.0
    found = transformation.dense(values, (9, 10))
    expected = [[basis(p / 2 - 1) * basis(q / 3 - 2) for q in range(10)] for p in range(9)]
    torch.testing.assert_close(found[0, 1], torch.tensor(expected))
    assert not found[0, 0].any()


def test_lattices_are_as_published() -> None:
    assert BSplineVelocity(2).lattice((128,) * 3) == (67, 67, 67)
    assert BSplineVelocity(4).lattice((128,) * 3) == (35, 35, 35)
    assert BSplineVelocity((2, 3, 4)).lattice((20, 24, 28)) == (13, 11, 10)
    assert StationaryVelocity().lattice((5, 7)) == (5, 7)


@pytest.mark.parametrize("size", [(9, 12), (7, 6, 8)])
def test_constant_control_points_move_all_alike(size: tuple[int, ...]) -> None:
    transformation = BSplineVelocity(2)
    values = torch.ones(1, len(size), *transformation.lattice(size)) * 1.25
    torch.testing.assert_close(transformation(values, size), torch.full((1, len(size), *size), 1.25))


@pytest.mark.parametrize("name", ["svf", "bspline"])
@pytest.mark.parametrize("size", [(6, 5), (4, 3, 5)])
def test_gradients_are_those_of_finite_differences(name: str, size: tuple[int, ...]) -> None:
    transformation = build_transformation(name, steps=3, control_spacing=2)
    shape = (1, len(size), *transformation.lattice(size))
    values = (0.7 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: transformation(v, size), (values,), fast_mode=True)


def smooth_velocity(size: tuple[int, ...], std: float) -> Tensor:
    white = SobolevSmoothing()(torch.randn(1, len(size), *size))
    for _ in range(12):
        white = SobolevSmoothing()(white)
    return white / white.std() * std


def test_seven_squarings_are_near_to_twelve() -> None:
    velocity = smooth_velocity((40, 36), 1.5)
    many, seven, four = (StationaryVelocity(steps)(velocity, (40, 36)) for steps in (12, 7, 4))
    assert (seven - many).abs().mean() < 5e-3 and (seven - many).abs().max() < 0.05
    assert (four - many).abs().mean() > 4 * (seven - many).abs().mean()


@pytest.mark.parametrize("size", [(41, 36), (21, 20, 23)])
def test_smooth_fields_are_integrated_well_on_a_coarser_grid(size: tuple[int, ...]) -> None:
    velocity = smooth_velocity(size, 1.0)
    fine = StationaryVelocity(12)(velocity, size)
    coarse = StationaryVelocity(12, integration_factor=2)(velocity, size)
    assert coarse.shape == fine.shape
    assert (coarse - fine).abs().mean() < 0.15 * fine.abs().mean()
    constant = torch.full((1, len(size), *size), 0.75)
    even = tuple(n - n % 2 for n in size)
    constant = constant[(..., *(slice(n) for n in even))]
    torch.testing.assert_close(StationaryVelocity(12, 2)(constant, even), constant)


def test_precision_is_kept_under_autocast() -> None:
    for name in ("svf", "bspline"):
        transformation = build_transformation(name)
        values = torch.randn(1, 2, *transformation.lattice((9, 8)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = transformation(values, (9, 8))
        assert torch.equal(found, transformation(values, (9, 8)))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters on \(7, 7\) points"):
        BSplineVelocity(2)(torch.zeros(1, 2, 8, 8), (8, 8))
    with pytest.raises(ValueError, match=r"one an axis of \(8, 8\)"):
        BSplineVelocity((2, 2, 2)).lattice((8, 8))
    with pytest.raises(ValueError, match="whole numbers above 0"):
        BSplineVelocity(0)
    with pytest.raises(ValueError, match="integration_factor 1 or more"):
        StationaryVelocity(7, 0)
    with pytest.raises(ValueError, match="name must be one of"):
        build_transformation("affine")


def test_published_svf(known: dict[str, Tensor]) -> None:
    velocity = known["svf_v"].flip(1).requires_grad_()
    ddf = StationaryVelocity()(velocity, (20,) * 3)
    torch.testing.assert_close(ddf.flip(1), known["svf_displacement"], atol=1e-5, rtol=0)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 20)] * 3, indexing="ij")).flip(0)
    torch.testing.assert_close(grid + ddf.flip(1) * 2 / 19, known["svf_transformation"], atol=1e-5, rtol=0)
    moved = warp(known["warp_im"], ddf)
    torch.testing.assert_close(moved, known["warped_im"], atol=1e-5, rtol=0)
    loss = moved.square().sum()
    assert float(loss.detach()) == pytest.approx(float(known["svf_loss"]), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, velocity)
    expected = known["svf_grad_v"]
    assert (gradient.flip(1) - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (gradient.flip(1) - expected).norm() < 1e-3 * expected.norm()


def test_published_labels_and_folding(known: dict[str, Tensor]) -> None:
    ddf = StationaryVelocity()(known["svf_v"].flip(1), (20,) * 3)
    assert torch.equal(warp(known["warp_seg"], ddf, mode="nearest"), known["warped_seg"])
    # Forward differences, the last one repeated.
    columns = []
    for axis in range(3):
        step = ddf.diff(dim=2 + axis)
        last = step.narrow(2 + axis, 18, 1)
        unit = torch.eye(3)[axis].view(1, 3, 1, 1, 1)
        columns.append(torch.cat((step, last), dim=2 + axis) + unit)
    volume = determinant(columns)
    expected = known["svf_logdetJ"]
    assert torch.equal(volume < 0, expected.isnan())
    inside = volume > 1e-3
    torch.testing.assert_close(volume[inside].log(), expected[inside], atol=1e-3, rtol=1e-5)


def test_published_splines(known: dict[str, Tensor]) -> None:
    values = known["svffd_v_cps2"].flip(1)
    transformation = BSplineVelocity(2)
    dense = transformation.dense(values, (20,) * 3)
    torch.testing.assert_close(dense.flip(1), known["svffd_dense_v"], atol=1e-5, rtol=0)
    ddf = transformation(values, (20,) * 3)
    torch.testing.assert_close(ddf.flip(1), known["svffd_displacement"], atol=1e-5, rtol=0)
    torch.testing.assert_close(integrate(dense, 12), ddf, atol=1e-5, rtol=0)
    spacing, size = (tuple(known[f"bspline_nc_{key}"].tolist()) for key in ("cps", "dims"))
    other = BSplineVelocity(spacing).dense(known["bspline_v_nc"].flip(1), size)
    torch.testing.assert_close(other.flip(1), known["bspline_dense_nc"], atol=1e-5, rtol=0)
