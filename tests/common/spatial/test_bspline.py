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

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor

from common.spatial import digital_jacobian_determinants
from common.spatial.bspline import bspline_displacement, contraction_bound, cubic_bspline

# SITReg's table.
PUBLISHED_BOUNDS = {
    1: 0.36,
    2: 0.3854469526363808,
    4: 0.39803114051999844,
    8: 0.4007250760586097,
    16: 0.40175329749498856,
    32: 0.40253633025170044,
}


def test_the_spline_is_scipys() -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = np.nan_to_num(BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)(x.numpy()))
    torch.testing.assert_close(cubic_bspline(x), torch.from_numpy(expected))


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
def test_published_fields(factor: int, shared: Path, device: torch.device) -> None:
    arrays = np.load(shared / "parity/dual_stream_pyramid/bspline_and_feature_sampling.npz")
    points = torch.from_numpy(arrays[f"cp_{factor}"]).to(device)
    expected = torch.from_numpy(arrays[f"disp_{factor}"]).to(device)
    torch.testing.assert_close(bspline_displacement(points, factor), expected, rtol=0, atol=1e-5)


def _by_definition(points: Tensor, factors: tuple[float, ...], size: tuple[int, ...]) -> Tensor:
    """The sum of the docstring, term by term."""
    ddf = torch.zeros(*points.shape[:2], *size, dtype=points.dtype)
    for x in itertools.product(*map(range, size)):
        q = [(i + 0.5) / f - 0.5 for i, f in zip(x, factors, strict=True)]
        ranges = [range(int(np.floor(p)) - 1, int(np.floor(p)) + 3) for p in q]
        for t in itertools.product(*ranges):
            weight = cubic_bspline(torch.tensor(q, dtype=torch.float64) - torch.tensor(t)).prod()
            where = tuple(min(max(s, 0), n - 1) for s, n in zip(t, points.shape[2:], strict=True))
            ddf[(slice(None), slice(None), *x)] += weight * points[(slice(None), slice(None), *where)]
    return ddf * torch.tensor(factors).view(1, -1, *(1,) * len(size))


@pytest.mark.parametrize(
    ("grid", "factor", "size"),
    [
        ((3, 2), 2, (5, 4)),
        ((1, 3), (3, 1), None),
        ((2, 3), 1, (4, 2)),
        ((2, 1, 2), (1, 2, 3), (2, 3, 5)),
        ((3, 3), 1.5, (5, 4)),
        ((3, 2), (1.5, 2.5), None),
    ],
)
def test_any_size_and_factor(
    grid: tuple[int, ...], factor: float | tuple[float, ...], size: tuple[int, ...] | None
) -> None:
    points = torch.randn(2, len(grid), *grid, dtype=torch.float64)
    factors = factor if isinstance(factor, tuple) else (factor,) * len(grid)
    shape = size or tuple(int(n * f) for n, f in zip(grid, factors, strict=True))
    ddf = bspline_displacement(points, factor, size)
    torch.testing.assert_close(ddf, _by_definition(points, factors, shape))


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_equal_control_points_shift_everything(factor: int) -> None:
    points = torch.tensor([0.25, -1.0, 0.5]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 4, 2)
    expected = (factor * points[..., :1, :1, :1]).expand(1, 3, 3 * factor, 4 * factor, 2 * factor)
    torch.testing.assert_close(bspline_displacement(points, factor), expected)


def test_control_points_of_half_precision_give_float32_fields_under_autocast() -> None:
    points = torch.randn(1, 2, 4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ddf = bspline_displacement(points, 3)
    assert ddf.dtype == torch.float32
    torch.testing.assert_close(ddf, bspline_displacement(points.float(), 3))


@pytest.mark.parametrize("factor", [1, 2])
def test_gradients(factor: int) -> None:
    points = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: bspline_displacement(c, factor), points)


@pytest.mark.parametrize(("factor", "size"), [(0, None), ((2, 2, 2), None), (2, (4,)), (2, (0, 4))])
def test_bad_arguments(factor: int | tuple[int, ...], size: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match="factor"):
        bspline_displacement(torch.zeros(1, 2, 2, 2), factor, size)


@pytest.mark.parametrize("factor", PUBLISHED_BOUNDS)
def test_published_bounds(factor: int) -> None:
    assert contraction_bound(factor) == pytest.approx(PUBLISHED_BOUNDS[factor], rel=1e-12)


def _worst_control_points(factor: int, dims: int) -> tuple[Tensor, Tensor]:
    """Of all signs of control points those, for a component, that change a displacement most between neighbours.

    They are found by brute force: the gradient of each cell's slope says which sign each control point should have.
    """
    points = torch.zeros(1, dims, *(6,) * dims, dtype=torch.float64, requires_grad=True)
    ddf = bspline_displacement(points, factor)[0, 0]
    middle = slice(5 * factor // 2, 7 * factor // 2 + 1)
    corner = tuple(slice(middle.start, middle.stop - 1) for _ in range(dims))
    slopes = sum(
        ddf.diff(dim=k)[tuple(c if j != k else middle for j, c in enumerate(corner))][
            tuple(slice(0, middle.stop - middle.start - 1) for _ in range(dims))
        ]
        for k in range(dims)
    )
    best, signs = 0.0, torch.zeros(0)
    for slope in slopes.flatten():
        (gradient,) = torch.autograd.grad(slope, points, retain_graph=True)
        if float(gradient.abs().sum()) > best:
            best, signs = float(gradient.abs().sum()), gradient.sign()
    return torch.tensor(best), signs


@pytest.mark.parametrize(("factor", "dims"), [(1, 2), (2, 2), (3, 2), (1, 3), (2, 3)])
def test_the_bound_is_the_least(factor: int, dims: int) -> None:
    greatest, signs = _worst_control_points(factor, dims)
    assert 1 / float(greatest) == pytest.approx(contraction_bound(factor, dims))
    # Just below the bound, the very worst control points move neighbours together, but not past each other.
    ddf = bspline_displacement(signs * contraction_bound(factor, dims) * 0.999, factor)
    step = sum(
        ddf[0, 0].diff(dim=k)[(slice(0, -1),) * k + (slice(None),) + (slice(0, -1),) * (dims - 1 - k)]
        for k in range(dims)
    )
    assert 0.998 < float(step.abs().max()) < 1


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("dims", [2, 3])
def test_bounded_control_points_never_fold(factor: int, dims: int) -> None:
    signs = torch.randn(4, dims, *(16 // factor,) * dims).sign()
    ddf = bspline_displacement(0.99 * contraction_bound(factor, dims) * signs, factor)
    assert float(digital_jacobian_determinants(ddf).min()) > 0
    # Free of the bound the same control points do fold: the test above can fail.
    assert float(digital_jacobian_determinants(5 * ddf).min()) < 0


def test_no_bound_below_factor_one() -> None:
    with pytest.raises(ValueError, match="factor"):
        contraction_bound(0)
