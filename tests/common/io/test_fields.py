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

import json
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from common.io import ScanError, load_field, save_field, save_image
from common.io.fields import field_from_lps, field_to_lps
from common.spatial import warp


def rigid_affine(seed: int, spacing: tuple[float, ...], flip: bool = False) -> np.ndarray:
    """An oblique, anisotropic voxel-to-RAS affine; with ``flip`` its determinant is negative."""
    d = len(spacing)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(np.eye(d) + 0.3 * rng.standard_normal((d, d)))[0]
    if (np.linalg.det(rotation) < 0) != flip:
        rotation[:, 0] *= -1
    affine = np.eye(d + 1)
    affine[:d, :d] = rotation * spacing
    affine[:d, d] = rng.uniform(-30, 30, d)
    return affine


def random_field(shape: tuple[int, ...], size: float = 1.0) -> Tensor:
    return size * torch.randn(1, len(shape), *shape)


FIXED = {3: ((9, 8, 7), (1.5, 1.0, 2.5)), 2: ((11, 9), (1.5, 0.75))}
MOVING = {3: ((10, 7, 9), (1.25, 1.5, 2.0)), 2: ((10, 12), (1.0, 1.25))}


def test_by_hand_one_voxel_along_each_axis_of_a_flipped_grid() -> None:
    # Axis 0 runs to the left with 2 mm, axis 1 to the front with 3 mm, axis 2 up with 4 mm.
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    ddf = np.ones((3, 1, 1, 1))
    # RAS (-2, 3, 4) is LPS (2, -3, 4).
    np.testing.assert_allclose(field_to_lps(ddf, affine)[:, 0, 0, 0], [2.0, -3.0, 4.0])


def test_by_hand_other_origin_of_the_moving_image() -> None:
    moving = np.eye(4)
    moving[0, 3] = 5.0
    # The same voxel index lies 5 mm further right in the moving image: LPS -5.
    np.testing.assert_allclose(field_to_lps(np.zeros((3, 2, 2, 2)), np.eye(4), moving)[:, 1, 1, 1], [-5.0, 0.0, 0.0])


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_voxels_to_mm_and_back(d: int, flip: bool) -> None:
    (shape, spacing), (_, other) = FIXED[d], MOVING[d]
    fixed, moving = rigid_affine(0, spacing, flip), rigid_affine(1, other)
    ddf = random_field(shape)[0].numpy()
    np.testing.assert_allclose(field_from_lps(field_to_lps(ddf, fixed, moving), fixed, moving), ddf, atol=1e-6)


@pytest.mark.parametrize("fmt", ["itk", "l2r"])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("two_grids", [False, True])
def test_save_and_load_round_trip(tmp_path: Path, fmt: str, d: int, two_grids: bool) -> None:
    (shape, spacing), (_, other) = FIXED[d], MOVING[d]
    fixed = rigid_affine(2, spacing, flip=True)
    moving = rigid_affine(3, other) if two_grids else None
    ddf = random_field(shape)
    path = save_field(tmp_path / "f" / "field.nii.gz", ddf, fixed, moving, fmt)
    back = load_field(path, fixed, moving, fmt)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, ddf, atol=2e-5, rtol=0)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("two_grids", [False, True])
def test_itk_warps_as_we_do(tmp_path: Path, d: int, flip: bool, two_grids: bool) -> None:
    """The oracle: ITK reads our files only, and its resampling has to give our warp."""
    fixed_shape, spacing = FIXED[d]
    moving_shape, other = MOVING[d] if two_grids else FIXED[d]
    fixed = rigid_affine(4, spacing, flip)
    moving = fixed
    if two_grids:
        # Elsewhere, yet overlapping: the centres of both fields of view coincide.
        moving = rigid_affine(5, other)
        centre_fixed = fixed @ [*[(n - 1) / 2 for n in fixed_shape], 1]
        moving[:d, d] += (centre_fixed - moving @ [*[(n - 1) / 2 for n in moving_shape], 1])[:d]
    ddf = random_field(fixed_shape, 0.7)
    if two_grids:
        # A voxel field between unlike grids that is about the identity in space, plus the random part.
        to_moving = np.linalg.inv(moving) @ fixed
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in fixed_shape], indexing="ij"))
        there = np.einsum("ij,j...->i...", to_moving[:d, :d], grid) + to_moving[:d, d].reshape(-1, *[1] * d)
        ddf = ddf + torch.from_numpy(there - grid).float()
    image = torch.rand(1, 1, *moving_shape)
    save_image(tmp_path / "fixed.nii.gz", np.zeros(fixed_shape, np.float32), fixed)
    save_image(tmp_path / "moving.nii.gz", image[0, 0].numpy(), moving)
    save_field(tmp_path / "field.nii.gz", ddf, fixed, moving)

    Image = itk.Image[itk.F, d]
    reference, source = (itk.imread(str(tmp_path / f"{n}.nii.gz"), itk.F) for n in ("fixed", "moving"))
    if d == 2:
        reference, source = (_plane(volume) for volume in (reference, source))
    field = itk.imread(str(tmp_path / "field.nii.gz"), itk.Vector[itk.F, d])
    assert field.GetImageDimension() == d
    transform = _transform(field)
    resampler = itk.ResampleImageFilter[Image, Image].New(
        source, Transform=transform, UseReferenceImage=True, ReferenceImage=reference
    )
    resampler.SetInterpolator(itk.LinearInterpolateImageFunction[Image, itk.D].New())
    resampler.Update()
    theirs = itk.array_from_image(resampler.GetOutput()).T

    ours = warp(image, ddf, padding="zeros")[0, 0].numpy()
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in fixed_shape], indexing="ij")) + ddf[0].numpy()
    last = np.array(moving_shape).reshape(-1, *[1] * d) - 1
    inside = ((grid > 0.01) & (grid < last - 0.01)).all(0)
    assert inside.mean() > 0.25
    np.testing.assert_allclose(theirs[inside], ours[inside], atol=1e-4)


def _transform(field: itk.Image) -> itk.Transform:
    """ITK's displacement field transform of doubles; Python can hand it the field only as a list of numbers."""
    d = field.GetImageDimension()
    transform = itk.DisplacementFieldTransform[itk.D, d].New()
    size = [float(n) for n in itk.size(field)]
    direction = np.asarray(field.GetDirection()).ravel().tolist()
    numbers = (
        [*size, *field.GetOrigin(), *field.GetSpacing(), *direction],
        itk.array_from_image(field).ravel().tolist(),
    )
    for values, put in zip(numbers, (transform.SetFixedParameters, transform.SetParametersByValue), strict=True):
        parameters = itk.OptimizerParameters[itk.D](len(values))
        for position, value in enumerate(values):
            parameters[position] = value
        put(parameters)
    return transform


def _plane(volume: itk.Image) -> itk.Image:
    """ITK reads (x, y, 1) as a volume; as a plane it keeps the in-plane part of the header."""
    plane = itk.image_from_array(itk.array_from_image(volume)[0].copy())
    plane.SetSpacing(list(volume.GetSpacing())[:2])
    plane.SetOrigin(list(volume.GetOrigin())[:2])
    plane.SetDirection(itk.matrix_from_array(np.asarray(volume.GetDirection())[:2, :2].copy()))
    return plane


def test_the_file_is_what_other_tools_expect(tmp_path: Path) -> None:
    path = save_field(tmp_path / "field.nii.gz", random_field((4, 5, 6)), np.eye(4))
    image = nib.load(path)
    assert image.shape == (4, 5, 6, 1, 3)
    assert image.header["intent_code"] == 1007
    assert image.get_data_dtype() == np.float32
    said = json.loads((tmp_path / "field.json").read_text())
    assert (said["units"], said["axes"]) == ("mm", "LPS")
    path = save_field(tmp_path / "disp_0001_0002.nii.gz", random_field((4, 5, 6)), np.eye(4), fmt="l2r")
    assert nib.load(path).shape == (4, 5, 6, 3)
    assert not (tmp_path / "disp_0001_0002.json").exists()


def test_learn2reg_reads_our_field_with_scipy(tmp_path: Path) -> None:
    """Learn2Reg's evaluation resamples with map_coordinates at index + field, channels along array axes."""
    from scipy.ndimage import map_coordinates

    shape = (7, 6, 5)
    ddf, image = random_field(shape, 0.5), torch.rand(1, 1, *shape)
    disp = np.asarray(nib.load(save_field(tmp_path / "d.nii.gz", ddf, np.eye(4), fmt="l2r")).dataobj)
    where = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")) + np.moveaxis(disp, -1, 0)
    theirs = map_coordinates(image[0, 0].numpy(), where, order=1, mode="nearest")
    np.testing.assert_allclose(warp(image, ddf)[0, 0].numpy(), theirs, atol=1e-5)


def test_channels_first_learn2reg_fields_are_read_too(tmp_path: Path) -> None:
    field = np.random.default_rng(0).random((3, 4, 5, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(field, np.eye(4)), tmp_path / "d.nii.gz")
    np.testing.assert_array_equal(load_field(tmp_path / "d.nii.gz", fmt="l2r")[0], field)


def test_a_field_of_another_grid_is_refused_with_both_affines(tmp_path: Path) -> None:
    path = save_field(tmp_path / "field.nii.gz", random_field((4, 5, 6)), np.eye(4))
    with pytest.raises(ValueError, match=r"another grid.*2\.000 mm"):
        load_field(path, np.array([[1.0, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (4, 5, 6, 1, 4), (4, 5, 6, 2, 3)])
def test_what_is_no_itk_field_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / "x.nii")
    with pytest.raises(ScanError, match="expected an ITK displacement field"):
        load_field(tmp_path / "x.nii")


def test_what_is_no_learn2reg_field_is_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), tmp_path / "x.nii")
    with pytest.raises(ScanError, match="expected a Learn2Reg field"):
        load_field(tmp_path / "x.nii", fmt="l2r")


def test_bad_arguments(tmp_path: Path) -> None:
    good = random_field((4, 5, 6))
    with pytest.raises(ValueError, match="unknown field format 'fsl'"):
        save_field(tmp_path / "x.nii", good, np.eye(4), fmt="fsl")
    with pytest.raises(ValueError, match=r"found shape \(2, 3, 4, 5, 6\)"):
        save_field(tmp_path / "x.nii", good.repeat(2, 1, 1, 1, 1), np.eye(4))
    with pytest.raises(ValueError, match="sheared"):
        save_field(tmp_path / "x.nii", good, np.array([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    good[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 values that are not finite"):
        save_field(tmp_path / "x.nii", good, np.eye(4))
    with pytest.raises(FileNotFoundError):
        load_field(tmp_path / "x.nii")


def test_saving_changes_neither_argument(tmp_path: Path) -> None:
    ddf, affine = random_field((4, 5, 6)), rigid_affine(0, (1.0, 2.0, 3.0))
    before = ddf.clone(), affine.copy()
    save_field(tmp_path / "x.nii", ddf, affine)
    assert torch.equal(ddf, before[0])
    np.testing.assert_array_equal(affine, before[1])
