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
"""From files to a network's input."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from common.transforms import CheckScand, ScalePercentilesd, scan_transforms


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, str]:
    rng = np.random.default_rng(0)
    lpi = np.diag([-1.0, 2.0, 1.0, 1.0])
    lpi[:3, 3] = [5, -3, 2]
    image = (rng.random((9, 7, 8)) * 1000).astype(np.float32)
    label = rng.integers(0, 40, (9, 7, 8)).astype(np.int16)
    return {"image": write(tmp_path / "i.nii.gz", image, lpi), "label": write(tmp_path / "l.nii.gz", label, lpi)}


def test_types_orientation_and_values(subject: dict[str, str]) -> None:
    out = scan_transforms(intensity="minmax")(subject)
    image, label = out["image"], out["label"]
    assert image.shape == label.shape == (1, 9, 7, 8)
    assert (image.dtype, label.dtype) == (torch.float32, torch.int32)
    assert nib.orientations.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")
    source = nib.load(subject["image"]).get_fdata()[::-1]
    expected = (source - source.min()) / (source.max() - source.min())
    assert np.allclose(image[0].numpy(), expected, atol=1e-6)
    assert np.array_equal(label[0].numpy(), nib.load(subject["label"]).get_fdata()[::-1])


def test_affine_leads_back_to_the_scan(subject: dict[str, str]) -> None:
    out = scan_transforms(spatial_size=(12, 6, 8), intensity="none")(subject)["image"]
    source = nib.load(subject["image"])
    assert np.allclose(out.meta["original_affine"], source.affine)
    voxel = np.array([5, 2, 3, 1])  # of the processed grid
    there = np.linalg.inv(source.affine) @ out.affine.numpy() @ voxel
    i, j, k = np.rint(there[:3]).astype(int)
    assert np.allclose(there[:3], (i, j, k))
    assert float(out[0, 5, 2, 3]) == pytest.approx(source.get_fdata()[i, j, k])


def test_pad_and_crop_are_symmetric(subject: dict[str, str]) -> None:
    whole = scan_transforms(intensity="none")(subject)
    out = scan_transforms(spatial_size=(13, 5, 8), intensity="none")(subject)
    assert out["image"].shape == out["label"].shape == (1, 13, 5, 8)
    assert torch.equal(out["image"][:, 2:11].as_tensor(), whole["image"][:, :, 1:6].as_tensor())
    assert not bool(out["image"][:, :2].any())
    assert not bool(out["label"][:, 11:].any())


def test_spacing_keeps_labels_whole(subject: dict[str, str]) -> None:
    out = scan_transforms(spacing=(1.0, 1.0, 1.0))(subject)
    assert out["image"].shape == out["label"].shape == (1, 9, 13, 8)
    before = set(np.unique(nib.load(subject["label"]).get_fdata()).astype(int))
    assert set(out["label"].unique().tolist()) <= before
    assert np.allclose(np.linalg.norm(out["image"].affine[:3, :3].numpy(), axis=0), 1.0)


def test_percentiles_by_hand() -> None:
    image = torch.arange(1001.0).view(1, 1001, 1)
    image[0, 1000] = 1e6  # an outlier must not darken the rest
    out = ScalePercentilesd(("image",))({"image": image})["image"]
    assert float(out[0, 5, 0]) == 0.0
    assert float(out[0, 500, 0]) == pytest.approx(0.5)
    assert float(out[0, 995, 0]) == 1.0
    assert float(out[0, 1000, 0]) == 1.0


def test_a_window_is_clipped_to_and_scaled(tmp_path: Path) -> None:
    values = np.array([-2000, -1000, -500, 0, 1000, 3000], dtype=np.float32).reshape(6, 1, 1)
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), path)
    out = scan_transforms(("image",), orientation=None, intensity=(-1000, 1000))({"image": path})["image"]
    assert out.flatten().tolist() == [0, 0, 0.25, 0.5, 1, 1]
    for window in [(1000, -1000), (0, 1, 2)]:
        with pytest.raises(ValueError, match="window"):
            scan_transforms(intensity=window)


@pytest.mark.parametrize("intensity", ["percentile", "minmax"])
def test_constant_images_become_zero(tmp_path: Path, intensity: str) -> None:
    path = write(tmp_path / "c.nii.gz", np.full((4, 4, 4), 7.0, np.float32))
    out = scan_transforms(("image",), intensity=intensity)({"image": path})["image"]
    assert not bool(out.any())


def test_an_almost_empty_image_keeps_its_content() -> None:
    image = torch.zeros(1, 20, 20, 20)
    image[0, 3, 3, 3:6] = torch.tensor([1.0, 2.0, 4.0])
    out = ScalePercentilesd(("image",))({"image": image})["image"]
    assert out[0, 3, 3, 3:6].tolist() == [0.25, 0.5, 1.0]


def test_a_trailing_axis_of_one_is_squeezed_and_time_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.nii.gz", np.random.default_rng(0).random((5, 6, 7, 1)).astype(np.float32))
    assert scan_transforms(("image",))({"image": one})["image"].shape == (1, 5, 6, 7)
    series = write(tmp_path / "series.nii.gz", np.zeros((5, 6, 7, 3), np.float32))
    with pytest.raises(RuntimeError) as error:
        scan_transforms(("image",))({"image": series})
    assert "series.nii.gz" in str(error.value.__cause__)
    assert "3 channels or time points of size (5, 6, 7)" in str(error.value.__cause__)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    image = torch.zeros(1, 3, 3)
    image[0, 1, 1] = bad
    with pytest.raises(ValueError, match=r"'image'.*1 values that are not finite"):
        CheckScand(("image",))({"image": image})


def test_an_image_is_no_label_map() -> None:
    with pytest.raises(ValueError, match=r"'label'.*whole numbers"):
        CheckScand(("label",), label_keys=("label",))({"label": torch.rand(1, 3, 3)})


def test_too_few_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 or 3 axes"):
        CheckScand(("image",))({"image": torch.zeros(1, 8)})


def test_missing_keys(subject: dict[str, str]) -> None:
    del subject["label"]
    assert set(scan_transforms(allow_missing_keys=True)(subject)) == {"image"}
    with pytest.raises(RuntimeError) as error:
        scan_transforms()(subject)
    assert "label" in str(error.value.__cause__)


def test_label_keys(subject: dict[str, str]) -> None:
    out = scan_transforms(keys=("image", "label"), label_keys=())(subject)
    assert out["label"].dtype == torch.float32
    out = scan_transforms(keys=("label",))(subject)
    assert out["label"].dtype == torch.int32


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="intensity"):
        scan_transforms(intensity="zscore")
    with pytest.raises(ValueError, match="label_keys"):
        scan_transforms(keys=("image",), label_keys=("segmentation",))
    with pytest.raises(ValueError, match="percentiles"):
        ScalePercentilesd(("image",), 50, 50)


def test_2d_nrrd(shared: Path) -> None:
    path = str(shared / "data" / "OASIS2D" / "oasis2d_0000.nrrd")
    out = scan_transforms(("image",), spatial_size=(144, 112))({"image": path})["image"]
    assert out.shape == (1, 144, 112)
    assert out.affine.shape == (3, 3)
    assert (float(out.min()), float(out.max())) == (0.0, 1.0)


def test_hippocampus(shared: Path) -> None:
    folder = shared / "data" / "Task04_Hippocampus"
    name = sorted(path.name for path in (folder / "imagesTr").glob("hippocampus_*.nii.gz"))[0]
    item = {"image": str(folder / "imagesTr" / name), "label": str(folder / "labelsTr" / name)}
    out = scan_transforms(spatial_size=(48, 64, 48))(item)
    assert out["image"].shape == out["label"].shape == (1, 48, 64, 48)
    assert out["label"].unique().tolist() == [0, 1, 2]


def test_a_cut_out_scan_is_continued_beyond_its_frame_and_its_labels_are_not(tmp_path: Path) -> None:
    values = np.arange(1, 28, dtype=np.float32).reshape(3, 3, 3)
    for name in ("image", "label"):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    files = {name: str(tmp_path / f"{name}.nii.gz") for name in ("image", "label")}
    item = scan_transforms(spatial_size=(5, 5, 5), intensity="none", padding="border")(files)
    assert item["image"][0, 0, 0, 0] == values[0, 0, 0] and item["image"][0, -1, -1, -1] == values[-1, -1, -1]
    assert item["image"][0, 0, 2, 3] == values[0, 1, 2]
    assert item["label"][0, 0].max() == 0 and item["label"][0, 1, 1, 1] == 1
    with pytest.raises(ValueError, match="padding must be one of"):
        scan_transforms(spatial_size=(5, 5, 5), padding="mirror")


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("ct_lung", [0, 0, 0.5, 1, 1]), ("ct_abdomen", [0, 0, 0, 0.775, 1]), ("none", [-1100, -1000, -425, 150, 3000])],
)
def test_presets_of_intensity(tmp_path: Path, preset: str, expected: list[float]) -> None:
    values = np.array([-1100.0, -1000, -425, 150, 3000], np.float32)
    path = write(tmp_path / "ct.nii.gz", np.broadcast_to(values[:, None, None], (5, 4, 3)))
    out = scan_transforms(["image"], intensity=preset)({"image": path})["image"]
    torch.testing.assert_close(out[0, :, 1, 2].as_tensor(), torch.tensor(expected, dtype=torch.float32))


def test_the_preset_of_mri_takes_percentiles(subject: dict[str, str]) -> None:
    one, two = (scan_transforms(["image"], intensity=name)(subject)["image"] for name in ("mri", "percentile"))
    assert torch.equal(one, two)


def test_what_is_loaded_already_is_taken_as_it_is(subject: dict[str, str]) -> None:
    options = {"spatial_size": (12, 6, 8), "spacing": (1.0, 1.0, 2.0), "padding": "border"}
    whole = scan_transforms(**options)(subject)  # type: ignore[arg-type]
    loaded = scan_transforms(orientation=None, intensity="none")(subject)
    again = scan_transforms(**options, load=False)(loaded)  # type: ignore[arg-type]
    for key in ("image", "label"):
        assert torch.equal(again[key], whole[key]) and torch.equal(again[key].affine, whole[key].affine)
