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
"""Several channels, windows and merged labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.transforms import scan_transforms
from common.transforms.channels import LoadChannelsd, MapLabelsd


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    draw = np.random.default_rng(0)
    return [write(tmp_path / f"c{k}.nii.gz", (100 * k + draw.random((6, 5, 4))).astype(np.float32)) for k in range(3)]


def test_files_become_channels_in_order_also_from_many_threads(files: list[str]) -> None:
    load = LoadChannelsd(("image", "label"))
    with ThreadPoolExecutor(8) as pool:
        items = list(pool.map(load, [{"image": files, "label": files[2]} for _ in range(40)]))
    for item in items:
        assert [round(float(channel.mean()), -2) for channel in item["image"]] == [0.0, 100.0, 200.0]
        assert item["label"].shape == (1, 6, 5, 4)
        np.testing.assert_allclose(item["image"].affine, np.diag([2.0, 2.0, 3.0, 1.0]))


def test_a_file_with_channels_as_its_last_axis_is_the_same_image(files: list[str], tmp_path: Path) -> None:
    both = np.stack([nib.load(path).get_fdata(dtype=np.float32) for path in files[:2]], -1)
    one = write(tmp_path / "both.nii.gz", both)
    transform = scan_transforms(("image",), spatial_size=(8, 8, 4), channels=2)
    first, second = (transform({"image": value})["image"] for value in (files[:2], one))
    assert first.shape == (2, 8, 8, 4)
    torch.testing.assert_close(first.as_tensor(), second.as_tensor())


def test_planes_and_flips_keep_channels_together(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    planes = [draw.random((6, 5, 1)).astype(np.float32) for _ in range(2)]
    paths = [write(tmp_path / f"{k}.nii.gz", plane, np.diag([-1.0, 1, 1, 1])) for k, plane in enumerate(planes)]
    transform = scan_transforms(("image",), spatial_size=(6, 5), intensity="none", channels=2)
    image = transform({"image": paths})["image"]
    np.testing.assert_array_equal(image, np.stack([plane[::-1, :, 0] for plane in planes]))


def test_each_channel_has_its_own_window(files: list[str]) -> None:
    transform = scan_transforms(("image",), intensity=[[0.0, 0.5], [100.0, 102.0]], channels=2, orientation=None)
    image = transform({"image": files[:2]})["image"]
    raw = [nib.load(path).get_fdata() for path in files[:2]]
    np.testing.assert_allclose(image[0], raw[0].clip(0, 0.5) / 0.5, atol=1e-6)
    np.testing.assert_allclose(image[1], (raw[1] - 100) / 2, atol=1e-5)
    lone = scan_transforms(("image",), intensity=(0.0, 200.0), channels=2)({"image": files[:2]})["image"]
    np.testing.assert_allclose(lone[1], raw[1] / 200, atol=1e-6)


@pytest.mark.parametrize("intensity", ["percentile", "minmax"])
def test_channels_are_scaled_one_by_one(files: list[str], intensity: str) -> None:
    image = scan_transforms(("image",), intensity=intensity, channels=3)({"image": files})["image"]
    for channel in image:
        assert (float(channel.min()), float(channel.max())) == (0.0, 1.0)


def test_labels_are_merged_and_the_rest_is_background() -> None:
    labels = torch.tensor([[[0, 1, 2, 3, 7, 8, 200, -4]]], dtype=torch.int32)
    mapped = MapLabelsd(("label",), {1: 5, 2: 5, 7: 1, 3: 3})({"label": labels})["label"]
    assert mapped.tolist() == [[[0, 5, 5, 3, 1, 0, 0, 0]]] and mapped.dtype == torch.int32


def test_masks_are_no_label_maps(tmp_path: Path) -> None:
    path = write(tmp_path / "l.nii.gz", np.full((4, 4, 4), 2, np.uint8))
    transform = scan_transforms(("image", "label", "mask"), label_map={2: 7}, intensity="none")
    item = transform({"image": path, "label": path, "mask": path})
    assert (int(item["label"].max()), int(item["mask"].max()), float(item["image"].max())) == (7, 2, 2.0)
    assert item["label"].dtype == torch.int32 and tuple(item["label"].affine.shape) == (4, 4)


def test_impossible_channels_are_refused(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 channel\(s\) need as many windows of intensities, got 3"):
        scan_transforms(("image",), intensity=[[0, 1]] * 3, channels=2)
    with pytest.raises(ValueError, match="low < high"):
        scan_transforms(("image",), intensity=[[0, 1], [2, 2]], channels=2)
    with pytest.raises(ValueError, match="not negative"):
        MapLabelsd(("label",), {-1: 2})
    for wanted, given in ((3, files[:2]), (2, files[0])):
        with pytest.raises(RuntimeError) as error:
            scan_transforms(("image",), channels=wanted)({"image": given})
        assert f"must have {wanted}" in str(error.value.__cause__)
    small = write(tmp_path / "small.nii.gz", np.zeros((4, 5, 4), np.float32))
    away = write(tmp_path / "away.nii.gz", np.zeros((6, 5, 4), np.float32), np.diag([2.0, 2.0, 3.5, 1.0]))
    for other in (small, away):
        with pytest.raises(ValueError, match=r"c0\.nii\.gz and .*must lie on one grid"):
            LoadChannelsd(("image",))({"image": [files[0], other]})
