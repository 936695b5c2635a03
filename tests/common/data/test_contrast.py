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
"""Subjects differ from the atlas by a known map and by a contrast that misleads a difference of intensities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.data import PairDataset, check_integrity, load_cohort
from common.data.contrast import LABELS, ContrastPair, make_contrast_pair
from common.data.contrast_tissue import Shape, places_of
from common.data.pairing import generator_for
from common.spatial import integrate, jacobian_determinant, warp, warp_labels
from common.transforms import scan_transforms

SIZES = [(64, 64), (57, 70), (40, 37, 36)]


@pytest.fixture(scope="module", params=SIZES, ids=str)
def pairs(request: pytest.FixtureRequest) -> list[ContrastPair]:
    count = 6 if len(request.param) == 2 else 2
    return [make_contrast_pair(request.param, subject=subject, contrast=0.0, noise=0.0) for subject in range(count)]


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    labels = [(a == value, b == value) for value in LABELS if value]
    return float(np.mean([2 * int((x & y).sum()) / int(x.sum() + y.sum()) for x, y in labels]))


def test_the_field_brings_moving_to_fixed(pairs: list[ContrastPair]) -> None:
    for pair in pairs:
        moved = warp(pair.moving[None, None], pair.true_ddf[None])[0, 0]
        error, before = ((image - pair.fixed).square().mean() for image in (moved, pair.moving))
        assert float(error) < 0.02 * float(before)


def test_the_field_is_exact_and_one_to_one(pairs: list[ContrastPair]) -> None:
    for subject, pair in enumerate(pairs):
        size = pair.fixed.shape
        shape = Shape(size, 1.0, generator_for(0, subject, 5))
        half = torch.tensor([(n - 1) / 2 for n in size]).view(-1, *[1] * len(size))
        arrived = places_of(size) + pair.true_ddf.double() / half
        assert float((shape(arrived) - places_of(size)).abs().max()) < 1e-6
        assert float(jacobian_determinant(pair.true_ddf[None]).min()) > 0
        length = pair.true_ddf.norm(dim=0)
        assert 2 * min(size) / 64 < float(length.max()) < 7 * min(size) / 64
        edge = torch.stack([length.select(k, end).amax() for k in range(len(size)) for end in (0, -1)])
        assert float(edge.max()) < 1e-6


def test_labels_and_masks_follow_the_field(pairs: list[ContrastPair]) -> None:
    before, after = [], []
    for pair in pairs:
        moved = warp_labels(pair.moving_label[None, None].int(), pair.true_ddf[None])[0, 0]
        after.append(dice(moved, pair.fixed_label))
        before.append(dice(pair.moving_label, pair.fixed_label))
        for label, mask in ((pair.fixed_label, pair.fixed_mask), (pair.moving_label, pair.moving_mask)):
            assert mask.dtype == torch.bool and bool(mask[label > 0].all())
            assert (label > 0).sum() < mask.sum() < 1.35 * (label > 0).sum()
            assert set(label.unique().tolist()) == set(LABELS)
    assert min(after) > 0.86 and np.mean(before) < 0.8


def test_contrast_changes_the_moving_image_alone() -> None:
    plain, strong = (make_contrast_pair((48, 40), subject=3, contrast=contrast, noise=0.0) for contrast in (0.0, 1.0))
    for same in ("fixed", "fixed_label", "moving_label", "moving_mask", "true_ddf"):
        assert torch.equal(getattr(plain, same), getattr(strong, same))
    inside = plain.moving_label > 0
    assert float((strong.moving - plain.moving)[inside].abs().mean()) > 0.06
    still = make_contrast_pair((48, 40), subject=3, magnitude=0.0, contrast=0.0, noise=0.0)
    assert torch.equal(still.moving, still.fixed) and not still.true_ddf.any()
    noisy = make_contrast_pair((48, 40), subject=3)
    assert 0.005 < float((noisy.moving - strong.moving).std()) < 0.02
    assert float(noisy.moving.min()) >= 0 and float(noisy.moving.max()) <= 1


def test_the_order_of_tissues_stays() -> None:
    """Edges point the same way: the gradients of either image, brought to one place, mostly agree in direction."""
    for subject in range(6):
        pair = make_contrast_pair((64, 64), subject=subject, noise=0.0)
        moved = warp(pair.moving[None, None], pair.true_ddf[None])[0, 0]
        slopes = [torch.stack(torch.gradient(image)) for image in (pair.fixed, moved)]
        product = (slopes[0] * slopes[1]).sum(0)
        strong = slopes[0].norm(dim=0) > 0.04
        assert float((product[strong] > 0).float().mean()) > 0.95


def _features(kind: str, image: torch.Tensor) -> torch.Tensor:
    if kind == "intensities":
        return image
    taps = torch.arange(-3, 4.0)
    narrow, wide = (torch.exp(-0.5 * (taps / sigma) ** 2) for sigma in (0.8, 2.5))
    kernel = [torch.outer(taps, taps) / taps.sum() ** 2 for taps in (narrow, wide)]
    return 2 * functional.conv2d(functional.pad(image, [3] * 4, mode="replicate"), (kernel[0] - kernel[1])[None, None])


def _registered(pairs: list[ContrastPair], kind: str, weight: float) -> float:
    """Mean Dice after registration by the squared difference of intensities or of differences of Gaussians."""
    fixed, moving = (torch.stack([getattr(pair, role) for pair in pairs])[:, None] for role in ("fixed", "moving"))
    velocity = torch.zeros(len(pairs), 2, *fixed.shape[2:], requires_grad=True)
    optimizer = torch.optim.Adam([velocity], 0.1)
    for _ in range(80):
        smooth = functional.avg_pool2d(velocity, 5, 1, 2, count_include_pad=False)
        ddf = integrate(smooth, 4)
        energy = (_features(kind, warp(moving, ddf)) - _features(kind, fixed)).square().sum()
        rough = sum((smooth.diff(dim=axis) ** 2).sum() for axis in (2, 3))
        optimizer.zero_grad()
        (energy + weight * rough).backward()
        optimizer.step()
    labels = torch.stack([pair.moving_label for pair in pairs])[:, None].int()
    moved = warp_labels(labels, ddf.detach())[:, 0]
    return float(np.mean([dice(own, pair.fixed_label) for own, pair in zip(moved, pairs, strict=True)]))


def test_intensities_mislead_and_features_do_not() -> None:
    changed, plain = (
        [make_contrast_pair((64, 64), subject=subject, contrast=contrast) for subject in range(30, 36)]
        for contrast in (1.0, 0.0)
    )
    before = float(np.mean([dice(pair.moving_label, pair.fixed_label) for pair in changed]))
    assert 0.6 < before < 0.7
    intensities, features = _registered(changed, "intensities", 0.2), _registered(changed, "features", 0.01)
    assert _registered(plain, "intensities", 0.2) > intensities + 0.04
    assert features > intensities + 0.05


def test_subjects_and_seeds_differ_and_nothing_else_does() -> None:
    one, again = (make_contrast_pair((48, 40), seed=3, subject=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    other = make_contrast_pair((48, 40), seed=3, subject=6)
    assert torch.equal(one.fixed, other.fixed) and not torch.equal(one.moving_label, other.moving_label)
    assert not torch.equal(one.fixed_label, make_contrast_pair((48, 40), seed=4, subject=5).fixed_label)


@pytest.mark.parametrize(("options", "shape"), [({}, (64, 64)), ({"spatial_size": [32, 33, 32]}, (32, 33, 32))])
def test_the_cohort_is_whole_and_sound(tmp_path: Path, options: dict[str, list[int]], shape: tuple[int, ...]) -> None:
    cohort = load_cohort("contrast", tmp_path, **options)
    assert (cohort.name, cohort.shape, cohort.labels) == ("contrast", shape, LABELS)
    assert (cohort.spatial_dims, cohort.evaluation_labels) == (len(shape), [1, 2, 3, 4, 5, 6, 7])
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (24, 6, 16)
    report = check_integrity(cohort)
    assert set(report.label_voxels) == set(LABELS) and not report.problems
    assert not [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert cohort.atlas is not None and cohort.atlas["id"] == "contrast_atlas"
    transform = scan_transforms(["image", "label", "mask"], shape, intensity="none", allow_missing_keys=True)
    training = PairDataset(
        cohort.training, strategy="atlas", atlas=cohort.atlas, atlas_is="fixed", transform=transform, progress=False
    )
    assert len(training) == 24 and {training.pair_ids(k)[1] for k in range(24)} == {"contrast_atlas"}
    item = PairDataset(cohort.test, strategy="listed", transform=transform)[3]
    assert (item["moving_id"], item["fixed_id"]) == ("contrast_0033", "contrast_atlas")
    made = make_contrast_pair(shape, subject=33)
    assert torch.equal(item["moving_label"][0], made.moving_label.int())
    assert torch.equal(item["fixed_mask"][0].bool(), made.fixed_mask)
    assert float((item["moving"][0] - made.moving).abs().max()) < 0.5 / 255 + 1e-6
    assert float((item["true_ddf"] - made.true_ddf).abs().max()) < 1e-5
    assert {"fixed_mask", "moving_mask"} <= set(training[0])


def test_the_cohort_is_made_once(tmp_path: Path) -> None:
    made = load_cohort("contrast", tmp_path, contrast=0.5)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert load_cohort("contrast", tmp_path, contrast=0.5, train_count=5).test == made.test
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    assert load_cohort("contrast", tmp_path).dataset_dir != made.dataset_dir


def test_impossible_cohorts_are_refused(tmp_path: Path) -> None:
    for options, reason in (
        ({"spatial_size": [16, 40]}, "at least 32"),
        ({"spatial_size": [40, 40], "spatial_dims": 3}, "3 numbers"),
        ({"spatial_dims": 4}, "2 or 3"),
        ({"magnitude": 3.0}, "magnitude"),
        ({"contrast": -1.0}, "contrast"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_cohort("contrast", tmp_path, **options)
    assert not list(tmp_path.iterdir())
