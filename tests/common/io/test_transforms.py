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
"""The golden matrix: what we write, ITK applies as we do, whatever the orientation, dimension, form and direction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import itk
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from common.io import (
    Scan,
    TransformError,
    grid_of,
    load_transform,
    load_transforms,
    save_field,
    save_transform,
)
from common.spatial import Affine, Displacement, Grid, SpatialTransform, warp
from tests.itk_oracle import MATRIX, NAMES, by_itk, inner_points, itk_transform, lps, ours, two_scans


@dataclass
class Case:
    """Two scans on disk and a transform between them: a smooth field, then an affine map."""

    fixed: Scan
    moving: Scan
    transform: SpatialTransform
    folder: Path


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    rng = np.random.default_rng(3)
    orientation, d = request.param
    scans = two_scans(tmp_path, orientation, d, rng)
    grid = grid_of(scans[0])
    field = np.stack([gaussian_filter(rng.standard_normal(grid.shape), 3.0) for _ in range(d)])
    field *= 1.5 / np.abs(field).max()
    matrix = np.eye(d + 1)
    matrix[:d, :d] += 0.08 * rng.standard_normal((d, d))
    matrix[:d, d] = rng.uniform(-1, 1, d)
    parts = (Displacement(torch.from_numpy(field).float(), grid), Affine(torch.from_numpy(matrix)))
    return Case(scans[0], scans[1], SpatialTransform(parts), tmp_path)


golden = pytest.mark.parametrize("case", MATRIX, ids=NAMES, indirect=True)


@golden
@pytest.mark.parametrize("file", ["t.nii.gz", "t.h5", "t.tfm", "t.mat"])
def test_itk_moves_images_and_points_as_we_do(case: Case, file: str) -> None:
    transform = case.transform
    if file.endswith(("tfm", "mat")):
        transform = SpatialTransform(transform.parts[1:])
    path = save_transform(case.folder / file, transform, case.fixed, case.moving)
    theirs = itk_transform(path, case.fixed.spatial_dims)
    moved, inside = ours(transform, case.moving, case.fixed)
    assert inside.mean() > 0.25
    np.testing.assert_allclose(by_itk(theirs, case.moving, case.fixed)[inside], moved[inside], atol=2e-4)
    points = inner_points(case.fixed)
    expected = [lps(np.array([theirs.TransformPoint(p.tolist())]))[0] for p in lps(points)]
    # The total field of the .nii.gz is linear between voxels, ours evaluates field and affine map exactly.
    np.testing.assert_allclose(transform.points(torch.from_numpy(points)).numpy(), expected, atol=2e-4)


@golden
@pytest.mark.parametrize("file", ["i.nii.gz", "i.h5"])
def test_itk_moves_back_by_our_inverse_as_we_do(case: Case, file: str) -> None:
    inverse, residual = case.transform.inverse()
    assert residual < 0.01
    path = save_transform(case.folder / file, inverse, case.moving, case.fixed)
    theirs = itk_transform(path, case.fixed.spatial_dims)
    moved, inside = ours(inverse, case.fixed, case.moving)
    assert inside.mean() > 0.25
    np.testing.assert_allclose(by_itk(theirs, case.fixed, case.moving)[inside], moved[inside], atol=2e-4)
    there = case.transform.points(torch.from_numpy(inner_points(case.fixed)))
    back = lps(np.array([theirs.TransformPoint(p.tolist()) for p in lps(there.numpy())]))
    # A sampled field bends between its voxels where the composite does not.
    np.testing.assert_allclose(back, inner_points(case.fixed), atol=0.15 if file.endswith("nii.gz") else 0.02)


@golden
@pytest.mark.parametrize("file", ["t.nii.gz", "t.h5", "t.mat", "l2r.nii.gz"])
def test_what_is_written_is_read_back(case: Case, file: str) -> None:
    transform = SpatialTransform(case.transform.parts[1:]) if file.endswith("mat") else case.transform
    form = "l2r" if file.startswith("l2r") else None
    path = save_transform(case.folder / file, transform, case.fixed, case.moving, form)
    fixed, moving = grid_of(case.fixed), grid_of(case.moving)
    back = load_transform(path, fixed=fixed, moving=moving)
    torch.testing.assert_close(back.ddf(fixed, moving), transform.ddf(fixed, moving), atol=2e-4, rtol=0)
    assert len(back.parts) == {"t.h5": 2}.get(file, 1)


def test_a_list_acts_as_with_ants(tmp_path: Path) -> None:
    """-t warp -t affine: the warp comes first for a point; and the way back, -t affine:inverse -t warp:inverse."""
    scan = Scan(np.zeros((8, 8, 8), np.float32), np.eye(4), tmp_path / "x", np.eye(4))
    shift = torch.zeros(1, 3, 8, 8, 8)
    shift[:, 0] = 1.0
    save_field(tmp_path / "warp.nii.gz", shift, np.eye(4))
    double = SpatialTransform((Affine(torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0]))),))
    save_transform(tmp_path / "affine.mat", double, scan, scan)
    point = torch.tensor([[3.0, 3.0, 3.0]])
    # x -> x + 1 -> 2 (x + 1), or, the other way round, x -> 2 x -> 2 x + 1.
    first = load_transforms([tmp_path / "warp.nii.gz", tmp_path / "affine.mat"])
    second = load_transforms([tmp_path / "affine.mat", tmp_path / "warp.nii.gz"])
    assert first.points(point).tolist() == [[8.0, 6.0, 6.0]] and second.points(point).tolist() == [[7.0, 6.0, 6.0]]
    back = load_transforms([f"{tmp_path / 'affine.mat'}:inverse", f"{tmp_path / 'warp.nii.gz'}:inverse"])
    torch.testing.assert_close(back.points(first.points(point)), point.double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_flirt_matrix_by_hand(tmp_path: Path, mirrored: bool) -> None:
    """FLIRT counts its first axis from the other end where the determinant is positive."""
    fixed = Grid((10, 8, 8), torch.diag(torch.tensor([-2.0 if mirrored else 2.0, 1.0, 1.0, 1.0])))
    moving = Grid((6, 8, 8), torch.diag(torch.tensor([-1.0 if mirrored else 1.0, 1.0, 1.0, 1.0])))
    path = tmp_path / "flirt.mat"
    # Moving to fixed: 3 mm along FSL's x, 1 mm along y.
    path.write_text("1 0 0 3\n0 1 0 1\n0 0 1 0\n0 0 0 1\n")
    # The fixed image's voxel 4 is FSL's 8 (mirrored) or (9 - 4) 2 = 10; 3 less is 5 or 7; the moving image's voxel is
    # 5 (mirrored) or 5 - 7 = -2, and its world coordinate -5 or -2.
    point = fixed.affine[:3, :3] @ torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    found = load_transform(path, fixed=fixed, moving=moving).points(point[None])[0]
    torch.testing.assert_close(found, torch.tensor([-5.0 if mirrored else -2.0, 2.0, 2.0], dtype=torch.float64))


def test_b_splines_are_sampled_on_the_fixed_grid_and_moments_of_rotation_are_kept(tmp_path: Path) -> None:
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    spline.SetTransformDomainPhysicalDimensions([20.0, 20.0, 20.0])
    spline.SetTransformDomainMeshSize([3, 3, 3])
    count = spline.GetNumberOfParameters()
    parameters = itk.OptimizerParameters[itk.D](count)
    for k, value in enumerate(np.random.default_rng(0).uniform(-1, 1, count)):
        parameters[k] = value
    spline.SetParametersByValue(parameters)
    euler = itk.Euler3DTransform[itk.D].New()
    euler.SetCenter([5.0, 6.0, 7.0])
    euler.SetRotation(0.1, 0.2, 0.3)
    both = itk.CompositeTransform[itk.D, 3].New()
    both.AddTransform(euler)
    both.AddTransform(spline)
    itk.transformwrite([both], str(tmp_path / "elastix.h5"))
    lattice = Grid((41, 41, 41), torch.diag(torch.tensor([-0.5, -0.5, 0.5, 1.0])))
    with pytest.raises(TransformError, match="needs the fixed image"):
        load_transform(tmp_path / "elastix.h5")
    found = load_transform(tmp_path / "elastix.h5", fixed=lattice)
    points = lps(np.random.default_rng(1).uniform(3, 17, (9, 3)))
    expected = [lps(np.array([both.TransformPoint(p.tolist())]))[0] for p in lps(points)]
    np.testing.assert_allclose(found.points(torch.from_numpy(points)).numpy(), expected, atol=0.01)


def test_the_sidecar_says_which_way(tmp_path: Path) -> None:
    scan = Scan(np.zeros((4, 4, 4), np.float32), np.eye(4), tmp_path / "x", np.eye(4))
    part = Displacement(torch.zeros(3, 4, 4, 4), grid_of(scan))
    save_transform(tmp_path / "t.h5", SpatialTransform((part, Affine(torch.eye(4)))), scan, scan)
    said = json.loads((tmp_path / "t.json").read_text())
    assert said["direction"].startswith("fixed to moving") and said["parts"] == ["displacement", "affine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.h5", "nothing", "cannot be read as an ITK transform"),
        ("t.tfm", "nothing", "cannot be read as an ITK transform"),
        ("t.doc", "", "unknown kind of file"),
        ("t.nii.gz", "nothing", "cannot be read as NIfTI"),
        ("flirt.mat", "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n", "name both"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TransformError, match=message) as raised:
        load_transform(tmp_path / name)
    assert name in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no transform at"):
        load_transform(tmp_path / "none.h5")


def test_a_field_does_not_go_into_an_affine_file(tmp_path: Path) -> None:
    scan = Scan(np.zeros((4, 4, 4), np.float32), np.eye(4), tmp_path / "x", np.eye(4))
    field = SpatialTransform((Displacement(torch.zeros(3, 4, 4, 4), grid_of(scan)),))
    with pytest.raises(TransformError, match=r"\.h5 or \.nii\.gz"):
        save_transform(tmp_path / "t.mat", field, scan, scan)
    assert not list(tmp_path.iterdir())


def by_hand(field: Tensor) -> SpatialTransform:
    return SpatialTransform((Displacement(field, Grid(field.shape[1:], torch.eye(field.shape[0] + 1))),))


def test_a_chain_resamples_once() -> None:
    """A chain of a shift by half a voxel there and back is the identity on the image, which two warps would blur."""
    half = torch.zeros(2, 9, 9)
    half[0] = 0.5
    chain = by_hand(half).then(by_hand(-half))
    image = torch.rand(1, 1, 9, 9)
    grid = Grid((9, 9), torch.eye(3))
    torch.testing.assert_close(warp(image, chain.ddf(grid, grid)), image)
