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

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.io import ScanError, image_dims, load_image
from common.io.headers import nifti_placement, scan_dims


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 6), (4, 5, 6, 1)])
@pytest.mark.parametrize("extension", [".nii", ".nii.gz", ".mha", ".nrrd"])
def test_dimensions_are_those_of_the_loaded_scan(tmp_path: Path, shape: tuple[int, ...], extension: str) -> None:
    path = tmp_path / f"ä scan{extension}"
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    if extension.startswith(".nii"):
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    else:
        itk = pytest.importorskip("itk")
        if len(shape) == 4:
            pytest.skip("the wheels of ITK have no images of four axes")
        itk.imwrite(itk.image_from_array(array.T.copy()), str(path))
    assert image_dims(path) == scan_dims(path) == load_image(path).spatial_dims


def test_a_series_has_more(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 2), np.float32), np.eye(4)), tmp_path / "a.nii")
    assert image_dims(tmp_path / "a.nii") == 4
    for read in (scan_dims, load_image):
        with pytest.raises(ScanError, match=r"a.nii has shape \(4, 5, 6, 2\).* choose a frame from 0 to 1 \(--frame\)"):
            read(tmp_path / "a.nii")
    assert scan_dims(tmp_path / "a.nii", frame=0) == 3
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 1, 2), np.float32), np.eye(4)), tmp_path / "b.nii")
    assert scan_dims(tmp_path / "b.nii", frame=1) == 2
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 1, 3), np.float32), np.eye(4)), tmp_path / "c.nii")
    for frame in (None, 0):
        with pytest.raises(ScanError, match="it looks like a vector image or displacement field"):
            scan_dims(tmp_path / "c.nii", frame=frame)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_a_damaged_header_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b nothing of use")
    with pytest.raises(ScanError, match=name):
        scan_dims(tmp_path / name)


def test_what_is_not_there_or_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image at .*a.nii"):
        image_dims(tmp_path / "a.nii")
    (tmp_path / "a.png").touch()
    with pytest.raises(ScanError, match=r"a.png: unknown image format"):
        image_dims(tmp_path / "a.png")


def test_both_placements_of_a_header(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4))
    image.header.set_xyzt_units("micron")
    image.set_sform(np.diag([2.0, 1, 1, 1]), code=2)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "a.nii.gz")
    placement = nifti_placement(tmp_path / "a.nii.gz")
    assert placement is not None and placement.unit == "micron" and placement.qform is None
    np.testing.assert_array_equal(placement.sform, np.diag([2.0, 1, 1, 1]))
    assert nifti_placement(tmp_path / "a.mha") is None
