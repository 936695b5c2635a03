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

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

from common.metrics import AverageSurfaceDistance, HausdorffDistance95
from common.metrics.surface import surface_distances, surface_elements


def box(shape: tuple[int, ...], *bounds: tuple[int, int], label: int = 1) -> torch.Tensor:
    volume = torch.zeros(shape, dtype=torch.int64)
    volume[tuple(slice(*b) for b in bounds)] = label
    return volume[None, None]


def blob(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A smooth random shape that stays off the edge of the image."""
    noise = ndimage.gaussian_filter(np.random.RandomState(seed).randn(*shape), 2)
    inside = np.zeros(shape, dtype=bool)
    inside[(slice(3, -3),) * len(shape)] = True
    return torch.from_numpy((noise > 0) & inside).long()[None, None]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_shifted_thin_plates(spacing: tuple[float, float, float], device: torch.device) -> None:
    """Two parallel one-voxel plates 3 voxels apart: every distance is 3 times the spacing across."""
    shape = (12, 7, 6)
    moved, fixed = (box(shape, (k, k + 1), (0, 7), (0, 6)).to(device) for k in (2, 5))
    expected = 3 * spacing[0]
    assert HausdorffDistance95([1], spacing)(moved, fixed).cpu().tolist() == [[pytest.approx(expected)]]
    assert AverageSurfaceDistance([1], spacing)(moved, fixed).cpu().tolist() == [[pytest.approx(expected)]]


def test_segments_of_different_length() -> None:
    """1-voxel-wide rows in 2-D, columns 2..3 and 2..9 (spacing 0.5 along them): distances 0, and 0 0 .5 1 ... 3."""
    moved, fixed = box((5, 12), (2, 3), (2, 4)), box((5, 12), (2, 3), (2, 10))
    spacing = (3.0, 0.5)
    back = [0, 0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    hd = HausdorffDistance95([1], spacing)(moved, fixed)
    assert float(hd) == pytest.approx(2.5 + 0.65 * 0.5)  # 95 % of 7 steps is 6.65
    assert float(AverageSurfaceDistance([1], spacing)(moved, fixed)) == pytest.approx(sum(back) / 8 / 2)


def test_spacing_at_call_per_item() -> None:
    moved, fixed = box((9, 5), (1, 2), (0, 5)), box((9, 5), (4, 5), (0, 5))
    metric = AverageSurfaceDistance([1], spacing=7.0)
    values = metric(torch.cat([moved, moved]), torch.cat([fixed, fixed]), spacing=[[1.0, 1.0], [2.0, 1.0]])
    assert values.tolist() == [[3.0], [6.0]]
    assert metric(moved, fixed).tolist() == [[21.0]]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("metric", [HausdorffDistance95, AverageSurfaceDistance])
def test_identical_labels_are_at_distance_zero(metric: type, dims: int) -> None:
    label = blob(0, (14, 13, 12)[:dims])
    assert metric([1], spacing=0.7)(label, label).tolist() == [[0.0]]


@pytest.mark.parametrize("metric", [HausdorffDistance95, AverageSurfaceDistance])
@pytest.mark.parametrize("options", [{}, {"definition": "learn2reg"}])
def test_absent_labels(metric: type, options: dict[str, str]) -> None:
    if metric is AverageSurfaceDistance and options:
        pytest.skip("has one definition")
    moved, fixed = box((6, 6, 6), (1, 3), (1, 3), (1, 3)), torch.zeros(1, 1, 6, 6, 6, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = metric([1, 2], **options)(torch.cat([moved, moved]), torch.cat([fixed, moved]))
    assert torch.isnan(values[0]).all() and float(values[1, 0]) == 0.0 and math.isnan(float(values[1, 1]))
    # Lost in warping: there before, gone after.
    assert metric([1], **options)(fixed, moved, moved).tolist() == [[math.inf]]


def test_edge_of_the_image_is_no_surface() -> None:
    """A slab that the image cuts off: only the face inside the image counts, 2 voxels from the other slab's."""
    moved, fixed = box((10, 4), (0, 3), (0, 4)), box((10, 4), (0, 5), (0, 4))
    assert float(AverageSurfaceDistance([1])(moved, fixed)) == 2.0
    full = torch.ones(1, 1, 10, 4, dtype=torch.int64)
    assert torch.isnan(AverageSurfaceDistance([1])(full, full)).all()


@pytest.mark.parametrize("shape", [(20, 18), (18, 16, 15)])
@pytest.mark.parametrize("spacing", [None, 2.0, "anisotropic"])
def test_agrees_with_monai(shape: tuple[int, ...], spacing: object) -> None:
    mm = (0.8, 2.0, 1.5)[: len(shape)] if spacing == "anisotropic" else spacing
    a, b = blob(1, shape), blob(2, shape)
    torch.testing.assert_close(
        HausdorffDistance95([1], mm)(a, b), compute_hausdorff_distance(a, b, True, percentile=95, spacing=mm)
    )
    one_sided = [compute_average_surface_distance(x, y, True, spacing=mm) for x, y in ((a, b), (b, a))]
    torch.testing.assert_close(AverageSurfaceDistance([1], mm)(a, b), (one_sided[0] + one_sided[1]) / 2)


def test_cropping_changes_nothing() -> None:
    """Several labels far apart, each measured in its own box, against whole volumes one by one."""
    parts = [blob(k, (14, 12, 11)) for k in range(4)]
    moved, fixed = torch.cat([parts[0], 5 * parts[1]], 2), torch.cat([parts[2], 5 * parts[3]], 2)
    values = AverageSurfaceDistance([1, 5])(moved, fixed)[0]
    for label, value in zip((1, 5), values, strict=True):
        whole = surface_distances((moved == label)[0, 0].numpy(), (fixed == label)[0, 0].numpy(), (1.0, 1.0, 1.0))
        assert float(value) == pytest.approx((whole.a_to_b.mean() + whole.b_to_a.mean()) / 2, rel=1e-6)


def test_label_order_and_odd_labels() -> None:
    moved = box((9, 9), (1, 2), (0, 9), label=300) + box((9, 9), (5, 6), (0, 9), label=7)
    fixed = box((9, 9), (2, 3), (0, 9), label=300) + box((9, 9), (8, 9), (0, 9), label=7)
    assert HausdorffDistance95([7, 300])(moved, fixed).tolist() == [[3.0, 1.0]]
    assert HausdorffDistance95([300, 7])(moved.float(), fixed.float()).tolist() == [[1.0, 3.0]]
    assert HausdorffDistance95([0])(moved, moved).tolist() == [[0.0]]


def test_learn2reg_single_voxels() -> None:
    """Two voxels 2 apart: of the 8 surface elements at the corners of each, 4 are at distance 2 and 4 at 1."""
    moved, fixed = box((7, 3, 3), (1, 2), (1, 2), (1, 2)), box((7, 3, 3), (3, 4), (1, 2), (1, 2))
    metric = HausdorffDistance95([1], spacing=5.0, definition="learn2reg")
    assert metric(moved, fixed).tolist() == [[2.0]]  # in voxels, whatever the spacing
    assert metric(moved, fixed, spacing=(3.0, 3.0, 3.0)).tolist() == [[2.0]]


def test_learn2reg_weighs_by_area() -> None:
    """At the edge of the image there is surface, and flat elements weigh more than corners."""
    elements, areas = surface_elements(np.ones((3, 4, 5), dtype=bool), (1.0, 1.0, 1.0))
    flat = 2 * (2 * 3 + 3 * 4 + 2 * 4)
    assert len(elements) == flat + 4 * (2 + 3 + 4) + 8
    # Flat elements have area 1; at a corner of the cube there is an equilateral triangle of side 1/sqrt 2.
    assert np.isclose(areas, 1.0).sum() == flat and np.isclose(areas, math.sqrt(3) / 8).sum() == 8


@pytest.mark.parametrize("shape", [(20, 18), (18, 16, 15)])
def test_learn2reg_against_an_independent_computation(shape: tuple[int, ...]) -> None:
    a, b = blob(5, shape), blob(6, shape)
    edges, distances, areas = get_edge_surface_distance(
        a[0, 0], b[0, 0], spacing=[1.0] * len(shape), use_subvoxels=True, symmetric=True
    )
    directed = []
    for distance, edge, area in zip(distances, edges, areas, strict=True):
        pairs = sorted(zip(distance.tolist(), area[edge].tolist(), strict=True))
        total, reached = sum(w for _, w in pairs), 0.0
        for value, weight in pairs:
            reached += weight
            if reached >= 0.95 * total:
                directed.append(value)
                break
    metric = HausdorffDistance95([1], definition="learn2reg")
    assert float(metric(a, b)) == pytest.approx(max(directed), rel=1e-6)


@pytest.mark.parametrize("key", ["iso", "aniso"])
def test_published_average_surface_distances(shared: Path, key: str) -> None:
    reference = np.load(shared / "parity" / "similarity_learning" / "metrics.npz")
    moving, fixed = (torch.from_numpy(reference[f"seg_{k}"].astype(np.int64))[None, None] for k in ("moving", "fixed"))
    # Arrays there are (z, y, x) and the spacing is (x, y, z).
    spacing = None if key == "iso" else reference["aniso_spacing_xyz"][::-1].tolist()
    values = AverageSurfaceDistance(reference["labels"].tolist(), spacing)(moving, fixed)[0]
    torch.testing.assert_close(values[:2], torch.from_numpy(reference[f"asd_{key}"][0, :2]), atol=1e-5, rtol=0)
    assert torch.isnan(values[2:]).all()
