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

import warnings
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common.io import ScanError, load_image, load_series, save_image

OBLIQUE = np.array(
    [[-0.9 * 1.5, 0.3, 0.0, 10.0], [0.4, 0.95 * 1.1, 0.1, -20.0], [0.1, 0.0, 2.5, 5.0], [0.0, 0.0, 0.0, 1.0]]
)


def ramp(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint16, np.float32, np.float64])
def test_save_and_load_keep_values_type_and_place(tmp_path: Path, dtype: type) -> None:
    path = save_image(tmp_path / "a" / "scan.nii.gz", ramp(3, 4, 5, dtype=dtype), OBLIQUE)
    scan = load_image(path)
    assert scan.array.dtype == dtype
    np.testing.assert_array_equal(scan.array, ramp(3, 4, 5, dtype=dtype))
    np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-5)
    assert [p.name for p in path.parent.iterdir()] == ["scan.nii.gz"], "no temporary file stays behind"


@pytest.mark.parametrize(
    ("dtype", "stored"), [(bool, np.uint8), (np.float16, np.float32), (np.int64, np.int32), (np.uint32, np.int32)]
)
def test_types_that_nifti_lacks_are_widened(tmp_path: Path, dtype: type, stored: type) -> None:
    scan = load_image(save_image(tmp_path / "scan.nii", (ramp(2, 3, 4) % 2).astype(dtype), np.eye(4)))
    assert scan.array.dtype == stored
    np.testing.assert_array_equal(scan.array, ramp(2, 3, 4) % 2)


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5000000000 do not fit into int32"):
        save_image(tmp_path / "scan.nii", np.full((2, 2, 2), 5_000_000_000), np.eye(4))


def test_a_plane_is_stored_with_depth_one_and_read_as_a_plane(tmp_path: Path) -> None:
    affine = np.array([[0.0, -2.0, 7.0], [3.0, 0.0, -4.0], [0.0, 0.0, 1.0]])
    path = save_image(tmp_path / "plane.nii.gz", ramp(4, 5), affine)
    assert nib.load(path).shape == (4, 5, 1)
    scan = load_image(path)
    assert scan.array.shape == (4, 5)
    np.testing.assert_allclose(scan.affine, affine)
    assert scan.spacing == (3.0, 2.0)
    assert scan.orientation == "AL"


def test_a_coronal_plane_keeps_its_spacing(tmp_path: Path) -> None:
    affine = np.array([[2.0, 0, 0, 1], [0, 0, 9.0, 2], [0, 3.0, 0, 3], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(ramp(4, 5, 1), affine), tmp_path / "plane.nii")
    scan = load_image(tmp_path / "plane.nii")
    assert scan.spacing == (2.0, 3.0)
    np.testing.assert_allclose(np.abs(np.diag(scan.affine)[:2]), (2.0, 3.0))


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(ramp(3, 4, 5, 1), OBLIQUE), tmp_path / "scan.nii.gz")
    assert load_image(tmp_path / "scan.nii.gz").array.shape == (3, 4, 5)


def test_intensity_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(
        np.array([0, 50, 100], dtype=np.uint8).reshape(3, 1, 1).repeat(2, 1).repeat(2, 2), np.eye(4)
    )
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "scan.nii")
    np.testing.assert_allclose(load_image(tmp_path / "scan.nii").array[:, 0, 0], [-10.0, 15.0, 40.0])


def test_big_endian_becomes_native(tmp_path: Path) -> None:
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    image = nib.Nifti1Image(ramp(3, 4, 5, dtype=np.dtype(">i2")), np.eye(4), header)
    nib.save(image, tmp_path / "scan.nii")
    scan = load_image(tmp_path / "scan.nii")
    assert scan.array.dtype.isnative
    np.testing.assert_array_equal(scan.array, ramp(3, 4, 5))


REFUSED = {
    "series": (ramp(3, 4, 5, 2), r"shape .3, 4, 5, 2.*a frame from 0 to 1 \(--frame\)"),
    "field": (ramp(3, 4, 5, 1, 3), "displacement field"),
    "complex": (ramp(3, 4, 5).astype(np.complex64), "complex"),
    "colours": (np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
    "line": (ramp(3), "2-D or 3-D"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_scalar_image_is_refused(tmp_path: Path, name: str) -> None:
    array, message = REFUSED[name]
    path = tmp_path / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    with pytest.raises(ScanError, match=message) as caught:
        load_image(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = save_image(tmp_path / "scan.nii.gz", np.random.default_rng(0).random((16, 16, 16)), np.eye(4))
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(ScanError, match=r"scan\.nii\.gz could not be read"):
        load_image(path)


def test_what_is_no_nifti_is_named(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").write_text("no image")
    with pytest.raises(ScanError, match=r"scan\.nii is no readable NIfTI"):
        load_image(tmp_path / "scan.nii")


def test_missing_files_and_unknown_formats(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        load_image(tmp_path / "none.nii")
    (tmp_path / "scan.jpg").write_text("")
    with pytest.raises(ScanError, match="unknown image format"):
        load_image(tmp_path / "scan.jpg")


def test_a_header_without_place_warns(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ramp(3, 4, 5), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, tmp_path / "scan.nii")
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        load_image(tmp_path / "scan.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(save_image(tmp_path / "placed.nii", ramp(3, 4, 5), np.eye(4)))


@pytest.mark.parametrize("extension", [".nrrd", ".mha"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_itk_files_arrive_in_ras_as_the_same_nifti_does(tmp_path: Path, extension: str, dimensions: int) -> None:
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((dimensions, dimensions)))[0]
    array = ramp(*(3, 4, 5)[:dimensions])
    image = itk.image_from_array(array.T.copy())
    image.SetSpacing([1.5, 0.5, 2.5][:dimensions])
    image.SetOrigin([10.0, -3.0, 4.0][:dimensions])
    image.SetDirection(itk.matrix_from_array(rotation))
    itk.imwrite(image, str(tmp_path / f"scan{extension}"))
    scan = load_image(tmp_path / f"scan{extension}")
    np.testing.assert_array_equal(scan.array, array)
    index = (2, 1, 3)[:dimensions]
    lps = np.asarray(image.TransformIndexToPhysicalPoint(index))
    ras = lps * np.array([-1, -1, 1])[:dimensions]
    np.testing.assert_allclose((scan.affine @ [*index, 1])[:dimensions], ras, atol=1e-9)
    np.testing.assert_allclose(scan.spacing, [1.5, 0.5, 2.5][:dimensions])


def test_itk_colours_are_refused(tmp_path: Path) -> None:
    itk.imwrite(itk.image_from_array(np.zeros((4, 4, 4, 3), np.float32), is_vector=True), str(tmp_path / "v.mha"))
    with pytest.raises(ScanError, match="3 values a voxel"):
        load_image(tmp_path / "v.mha")


def test_overwriting_is_a_choice(tmp_path: Path) -> None:
    path = save_image(tmp_path / "scan.nii", ramp(2, 2, 2), np.eye(4))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_image(path, ramp(2, 2, 2) + 1, np.eye(4), overwrite=False)
    assert load_image(path).array.max() == 7
    save_image(path, ramp(2, 2, 2) + 1, np.eye(4))
    assert load_image(path).array.max() == 8


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(tmp_path / "scan.nii", ramp(2, 2, 2), np.eye(4))

    def fail(image: object, name: Path) -> None:
        Path(name).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(path, ramp(2, 2, 2) + 1, np.eye(4))
    monkeypatch.undo()
    assert load_image(path).array.max() == 7
    assert len(list(tmp_path.iterdir())) == 1


def test_unusable_arguments_name_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in one of \['.nii', '.nii.gz'\]"):
        save_image(tmp_path / "scan.png", ramp(2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        save_image(tmp_path / "scan.nii", ramp(2, 2, 2), np.eye(2))
    with pytest.raises(ValueError, match="singular"):
        save_image(tmp_path / "scan.nii", ramp(2, 2, 2), np.diag([1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"found shape \(8,\)"):
        save_image(tmp_path / "scan.nii", ramp(8), np.eye(4))


def test_names_with_spaces_and_letters_of_any_script(tmp_path: Path) -> None:
    path = save_image(tmp_path / "Übung 影像 (1).nii.gz", ramp(2, 2, 2), np.eye(4))
    assert load_image(path).path == path


def test_sheared_affines_are_kept_in_the_sform_alone(tmp_path: Path) -> None:
    sheared = np.array([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    path = save_image(tmp_path / "scan.nii", ramp(2, 2, 2), sheared)
    np.testing.assert_allclose(load_image(path).affine, sheared)
    assert nib.load(path).header["qform_code"] == 0


def test_real_brain(shared: Path) -> None:
    scan = load_image(shared / "data/brain_pair/image_A_full_size.nii.gz")
    assert scan.array.shape == (160, 192, 224)
    assert scan.orientation == "LIA"
    assert load_image(shared / "data/OASIS2D/oasis2d_0000.nrrd").array.shape == (128, 128)


def test_a_frame_of_a_series_is_a_scan(tmp_path: Path) -> None:
    series = ramp(3, 4, 5, 2)
    nib.save(nib.Nifti1Image(series, np.diag([2.0, 1, 1, 1])), tmp_path / "series.nii.gz")
    path = tmp_path / "series.nii.gz"
    assert np.array_equal(load_image(path, frame=1).array, series[..., 1])
    assert np.array_equal(load_image(path, frame=-2).array, series[..., 0])
    assert [np.array_equal(scan.array, series[..., k]) for k, scan in enumerate(load_series(path))] == [True, True]
    with pytest.raises(ScanError, match=r"no frame 2, as its frames are 0 to 1"):
        load_image(path, frame=2)
    save_image(tmp_path / "one.nii.gz", series[..., 0], np.eye(4))
    assert load_image(tmp_path / "one.nii.gz", frame=0).array.shape == (3, 4, 5)
    assert len(load_series(tmp_path / "one.nii.gz")) == 1
