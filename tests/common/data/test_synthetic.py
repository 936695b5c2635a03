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

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from common.data import check_integrity, load_cohort
from common.data.synthetic import LABELS, make_subject, synthetic_cohort
from common.io import load_image


def mean_dice(labels: list[torch.Tensor]) -> float:
    scores = []
    for i, a in enumerate(labels):
        for b in labels[:i]:
            for value in range(1, len(LABELS)):
                first, second = a == value, b == value
                scores.append(2 * (first & second).sum().item() / (first.sum() + second.sum()).item())
    return float(np.mean(scores))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cohort")


@pytest.mark.parametrize("dims", [2, 3])
def test_the_cohort_is_whole_and_sound(folder: Path, dims: int) -> None:
    cohort = load_cohort("synthetic", folder, spatial_dims=dims, spatial_size=32)
    assert (len(cohort.training), len(cohort.validation), len(cohort.test)) == (16, 6, 20)
    assert cohort.shape == (32,) * dims
    assert cohort.labels == LABELS
    report = check_integrity(cohort)
    assert (report.images, set(report.label_voxels)) == (24, set(LABELS))
    assert 0 <= report.intensity[0] < report.intensity[1] <= 1


def test_it_is_made_once_and_then_read(folder: Path) -> None:
    cohort = load_cohort("synthetic", folder, spatial_dims=2, spatial_size=24)
    stamps = {path: Path(path).stat().st_mtime_ns for path in cohort.files()}
    again = load_cohort("synthetic", folder, spatial_dims=2, spatial_size=24)
    assert {path: Path(path).stat().st_mtime_ns for path in again.files()} == stamps
    assert not list(folder.rglob(".*")), "nothing half-made stays behind"


def digests(folder: Path, seed: int) -> list[str]:
    cohort = load_cohort("synthetic", folder, spatial_dims=2, spatial_size=24, anatomy_seed=seed)
    return [hashlib.sha256(load_image(path).array.tobytes()).hexdigest() for path in cohort.files()]


def test_the_same_seed_gives_the_same_voxels(folder: Path, tmp_path: Path) -> None:
    first = digests(folder, 0)
    assert first == digests(tmp_path / "a", 0)
    assert not set(first) & set(digests(tmp_path / "b", 1))


def test_the_seed_of_a_run_changes_the_subset_but_not_the_data(folder: Path) -> None:
    first, second = (
        load_cohort("synthetic", folder, spatial_dims=2, spatial_size=24, train_count=8, seed=s) for s in (0, 1)
    )
    assert first.test == second.test
    assert first.training != second.training


def test_global_generators_do_not_matter() -> None:
    first = make_subject((24, 24), subject=3)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the legacy global generator is what must not matter
    second = make_subject((24, 24), subject=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("size", "seed"), [((48, 48, 48), 0), ((64, 64), 0), ((64, 64), 1), ((40, 48, 32), 2)])
def test_subjects_overlap_by_about_six_tenths(size: tuple[int, ...], seed: int) -> None:
    labels = [make_subject(size, seed=seed, subject=subject)[1] for subject in range(5)]
    assert 0.5 < mean_dice(labels) < 0.75
    assert mean_dice([make_subject(size, seed=seed, subject=s, magnitude=0)[1] for s in range(2)]) == 1.0


def test_the_difference_in_shape_can_be_registered_away() -> None:
    """A few steps of plain gradient descent on one pair of images raise the overlap of the labels."""
    from common.spatial import integrate, warp, warp_labels

    (moving, moving_label), (fixed, fixed_label) = (make_subject((64, 64), subject=s) for s in (0, 1))
    coarse = torch.zeros(1, 2, 16, 16, requires_grad=True)
    optimiser = torch.optim.Adam([coarse], lr=0.3)

    def field() -> torch.Tensor:
        return integrate(torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear", align_corners=True))

    for _ in range(60):
        optimiser.zero_grad()
        loss = (warp(moving[None, None], field()) - fixed[None, None]).square().mean() + 1e-5 * coarse.square().mean()
        loss.backward()
        optimiser.step()
    moved = warp_labels(moving_label[None, None].int(), field().detach())[0, 0]
    before, after = (mean_dice([fixed_label, label]) for label in (moving_label, moved))
    assert after > before + 0.15


def test_it_looks_like_a_scan() -> None:
    image, label = make_subject((32, 32, 32))
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8
    means = [image[label == value].mean().item() for value in LABELS]
    assert means[0] < 0.1 < means[3] < means[1] < means[2] < means[5]
    assert label[0].max() == 0 and label[-1].max() == 0, "the organ does not touch the border"


def test_it_is_quick() -> None:
    # CPU time of this thread, so that a busy machine does not fail the test.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.thread_time()
        for subject in range(3):
            make_subject((48, 48, 48), subject=subject)
        assert (time.thread_time() - start) / 3 * 24 < 10
    finally:
        torch.set_num_threads(threads)


def test_runs_that_start_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    def load(_: int) -> int:
        return len(load_cohort("synthetic", tmp_path, spatial_dims=2, spatial_size=16).files())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(load, range(4))) == [48] * 4
    assert not list(tmp_path.rglob(".*"))


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cohort = synthetic_cohort(spatial_dims=2, spatial_size=16)
    assert Path(cohort.dataset_dir).is_relative_to(tmp_path / "warpzoo")
    assert json.loads((Path(cohort.dataset_dir) / "dataset.json").read_text())["licence"] == "CC0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "must be 2 or 3, found 4"),
        ({"spatial_size": 8}, r"at least 16, found \(8, 8, 8\)"),
        ({"spatial_size": (32, 32)}, r"needs 3 numbers.*\(32, 32\)"),
    ],
)
def test_impossible_grids(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_cohort(tmp_path, **arguments)  # type: ignore[arg-type]
