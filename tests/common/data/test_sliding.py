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
"""Two blocks slide past each other exactly as the cohort says they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import PairDataset, check_integrity, load_cohort
from common.data.sliding import LABELS, SlidingPair, make_sliding_pair
from common.spatial import warp, warp_labels, warp_points

SIZES = [(64, 64), (57, 70), (52, 44, 48)]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def pairs(request: pytest.FixtureRequest) -> list[SlidingPair]:
    count = 8 if len(request.param) == 2 else 2
    return [make_sliding_pair(request.param, subject=subject, noise=0.0) for subject in range(count)]


def dice(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    labels = [(a == value, b == value) for value in LABELS if value]
    return [2 * int((x & y).sum()) / int(x.sum() + y.sum()) for x, y in labels]


def voxels_apart(pair: SlidingPair) -> torch.Tensor:
    """Voxels of the fixed grid whose linear interpolation in the moving image stays within one block."""
    return pair.distance.abs() > len(pair.fixed.shape) ** 0.5


def test_the_field_brings_moving_to_fixed(pairs: list[SlidingPair]) -> None:
    for pair in pairs:
        moved = warp(pair.moving[None, None], pair.true_ddf[None])[0, 0]
        apart = voxels_apart(pair)
        worst = float((moved - pair.fixed)[apart].abs().max())
        assert worst < 0.5 * float((pair.moving - pair.fixed)[apart].abs().max()), "interpolation of sharp edges"
        error, before = ((image - pair.fixed)[apart].square().mean() for image in (moved, pair.moving))
        assert float(error) < 0.02 * float(before)


def test_noise_is_all_that_an_image_adds() -> None:
    clean, noisy = (make_sliding_pair((48, 48), subject=3, noise=noise) for noise in (0.0, 0.015))
    assert torch.equal(clean.true_ddf, noisy.true_ddf) and torch.equal(clean.fixed_label, noisy.fixed_label)
    for one, other in ((clean.fixed, noisy.fixed), (clean.moving, noisy.moving)):
        assert 0.012 < float((one - other).std()) < 0.018
        assert float(other.min()) >= 0.0 and float(other.max()) <= 1.0
    assert not torch.equal(noisy.fixed - clean.fixed, noisy.moving - clean.moving)


def test_labels_follow_the_field(pairs: list[SlidingPair]) -> None:
    for pair in pairs:
        moved = warp_labels(pair.moving_label[None, None].int(), pair.true_ddf[None])[0, 0]
        after, before = dice(moved, pair.fixed_label), dice(pair.moving_label, pair.fixed_label)
        assert min(after) > 0.85 and np.mean(after) > 0.91 and np.mean(before) < np.mean(after) - 0.1
        for value in (1, 2, 3, 4):
            side = pair.distance[pair.fixed_label == value]
            assert bool((side > 0).all() if value < 3 else (side <= 0).all()), "no structure crosses the interface"
            nearest = float(side.abs().min())
            assert nearest < 2 if value % 2 else nearest > 3


def test_the_field_jumps_at_the_interface_alone_and_is_parallel_to_it(pairs: list[SlidingPair]) -> None:
    for pair in pairs:
        field, distance = pair.true_ddf.double(), pair.distance.double()
        unit = min(pair.fixed.shape) / 64
        for axis in range(distance.ndim):
            jump = field.diff(dim=axis + 1).norm(dim=0)
            here = distance.narrow(axis, 0, distance.shape[axis] - 1)
            crosses = (here > 0) != (distance.narrow(axis, 1, distance.shape[axis] - 1) > 0)
            assert float(jump[~crosses].max()) < 0.9
            if crosses.any():
                assert float(jump[crosses].max()) > 5 * unit
        slopes = [torch.stack(torch.gradient(distance)).flatten(1)[:, 0] for _ in (0,)]
        across = torch.einsum("i,i...->...", slopes[0], field)
        assert float(across.abs().max()) < 1e-4, "nothing moves across the interface"
        assert 3.5 * unit < float(field.norm(dim=0).max()) < 6.1 * unit
        for axis in range(distance.ndim):
            for end in (0, -1):
                assert float(field.select(axis + 1, end).abs().max()) < 1e-6, "nothing moves at the border"


def test_tissue_never_folds_within_a_block(pairs: list[SlidingPair]) -> None:
    for pair in pairs:
        field = pair.true_ddf.double()
        # The motion is along one direction t: the determinant is 1 + t·∇(u·t).
        flat = field.flatten(1)
        direction = flat[:, flat.norm(dim=0).argmax()]
        direction = direction / direction.norm()
        along = torch.einsum("i,i...->...", direction, field)
        slope = sum(d * g for d, g in zip(direction, torch.gradient(along), strict=True))
        assert float(slope[pair.distance.abs() > 2].min()) > -0.9


def test_landmarks_lie_on_both_sides_and_know_their_partners(pairs: list[SlidingPair]) -> None:
    for pair in pairs:
        points, targets = (torch.as_tensor(p).float()[None] for p in (pair.fixed_points, pair.moving_points))
        moved = warp_points(points, pair.true_ddf[None])
        assert float((moved - targets).norm(dim=2).max()) < 0.1
        assert float((points - targets).norm(dim=2).mean()) > 2.2 * min(pair.fixed.shape) / 64
        nearest = tuple(torch.as_tensor(pair.fixed_points).round().long().T)
        side = pair.distance[nearest]
        assert 10 <= int((side > 0).sum()) <= 14 and float(side.abs().max()) < 5.0
        inside = (points[0] >= 0) & (points[0] <= torch.tensor(pair.fixed.shape) - 1)
        assert bool(inside.all())


def test_no_smooth_field_does_as_well(pairs: list[SlidingPair]) -> None:
    from scipy.ndimage import gaussian_filter

    for pair in pairs:
        sigma = (0.0, *[2.0] * pair.fixed.ndim)
        smooth = torch.from_numpy(gaussian_filter(pair.true_ddf.numpy(), sigma))
        near = (pair.distance.abs() < 5) & voxels_apart(pair)
        errors = [
            float((warp(pair.moving[None, None], ddf[None])[0, 0] - pair.fixed)[near].square().mean())
            for ddf in (smooth, pair.true_ddf)
        ]
        assert errors[0] > 3 * errors[1]


def test_subjects_and_seeds_differ_and_nothing_else_does() -> None:
    one = make_sliding_pair((48, 40), seed=3, subject=5)
    again = make_sliding_pair((48, 40), seed=3, subject=5)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one, again, strict=True))
    for other in ({"seed": 4, "subject": 5}, {"seed": 3, "subject": 6}):
        assert not torch.equal(one.fixed_label, make_sliding_pair((48, 40), **other).fixed_label)
    still = make_sliding_pair((48, 40), seed=3, subject=5, magnitude=0.0)
    assert not still.true_ddf.any() and torch.equal(still.fixed_label, still.moving_label)


def test_blocks_go_either_way() -> None:
    turns = []
    for subject in range(16):
        pair = make_sliding_pair((32, 32), subject=subject)
        normal = torch.stack(torch.gradient(pair.distance)).flatten(1)[:, 0]
        first = pair.true_ddf[:, pair.distance > 0].mean(1)
        turns.append(float(normal[0] * first[1] - normal[1] * first[0]) > 0)
    assert 3 <= sum(turns) <= 13


@pytest.mark.parametrize(("options", "shape"), [({}, (64, 64)), ({"spatial_size": [32, 40]}, (32, 40))])
def test_the_cohort_is_whole_and_sound(tmp_path: Path, options: dict[str, list[int]], shape: tuple[int, ...]) -> None:
    cohort = load_cohort("sliding", tmp_path, **options)
    assert (cohort.name, cohort.shape, cohort.labels, cohort.spatial_dims) == ("sliding", shape, LABELS, 2)
    assert (len(cohort.training), len(cohort.training_pairs)) == (0, 40)
    assert (len(cohort.validation), len(cohort.test)) == (8, 16)
    report = check_integrity(cohort)
    assert (report.images, set(report.label_voxels)) == (128, set(LABELS))
    left = [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not left, "it is written under another name and takes its own when it is complete"
    item = PairDataset(cohort.training_pairs, strategy="listed")[3]
    assert (item["moving_id"], item["fixed_id"]) == ("sliding_0003_0001", "sliding_0003_0000")
    made = make_sliding_pair(shape, subject=3)
    assert float((item["fixed"][0] - made.fixed).abs().max()) < 0.5 / 255 + 1e-6
    assert torch.equal(item["moving_label"][0], made.moving_label.int())
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert load_cohort("sliding", tmp_path, train_count=5, **options).test == cohort.test
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}, "made once"


def test_impossible_cohorts_are_refused(tmp_path: Path) -> None:
    for options, reason in (
        ({"spatial_size": [16, 40]}, "at least 32"),
        ({"spatial_size": [40, 40], "spatial_dims": 3}, "3 numbers"),
        ({"spatial_dims": 4}, "2 or 3"),
        ({"magnitude": 3.0}, "fold"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_cohort("sliding", tmp_path, **options)
    assert not list(tmp_path.iterdir())
