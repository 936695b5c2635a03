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
"""What a registration leaves, applied by ITK and by ``python -m common apply``, is what it says it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from scipy.ndimage import gaussian_filter

from common.apply import apply
from common.handlers import RegistrationWriter
from common.handlers.registered import RegisteredPair
from common.handlers.results import jacobian_map
from common.io import Scan, grid_of, load_image, load_transform, save_image
from common.spatial import invert, jacobian_determinant
from tests.bundles.commands import succeed
from tests.itk_oracle import MATRIX, NAMES, by_itk, inner_points, itk_transform, lps, ours, placement, two_scans
from tests.processes import run_python


@dataclass
class Left:
    """Two scans, what a network said of them, and the folder that the writer left."""

    fixed: Scan
    moving: Scan
    output: dict[str, Any]
    folder: Path


def network_output(d: int, matrix: np.ndarray | None, own_inverse: bool) -> dict[str, Any]:
    """A smooth field on a canonical grid of 1.4 mm that neither file has, the moving scan seen through ``matrix``."""
    rng = np.random.default_rng(11)
    shape = (24, 20, 22)[:d]
    field = np.stack([gaussian_filter(rng.standard_normal(shape), 3.0) for _ in range(d)])
    ddf = torch.from_numpy(field * 1.5 / np.abs(field).max()).float()[None]
    fixed = torch.from_numpy(placement("RAS", shape, (1.4,) * d, 4.0))[None]
    output = {"ddf": ddf, "fixed_affine": fixed, "moving_affine": fixed}
    if matrix is not None:
        output |= {"moving_affine": torch.from_numpy(matrix) @ fixed, "affine_matrix": torch.from_numpy(matrix)[None]}
    return output | ({"inverse_ddf": invert(ddf).ddf} if own_inverse else {})


def write(scans: tuple[Scan, Scan], output: dict[str, Any], folder: Path, **options: Any) -> None:
    pair = {"moving": scans[1].path, "fixed": scans[0].path}
    names = {"moving_id": ["moving"], "fixed_id": ["fixed"], "metrics": {}}
    engine = Engine(lambda engine, batch: {**names, **output})
    everything: dict[str, Any] = {"field_format": ["itk", "composite"], "inverse": "auto"}
    RegistrationWriter(folder, [pair], **{**everything, **options}).attach(engine)
    engine.run([0])


def affine_map(d: int) -> np.ndarray:
    rng = np.random.default_rng(2)
    matrix = np.eye(d + 1)
    matrix[:d, :d] += 0.08 * rng.standard_normal((d, d))
    matrix[:d, d] = rng.uniform(-1, 1, d)
    return matrix


@pytest.fixture
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Left:
    (orientation, d), affine, own = request.param
    fixed, moving = two_scans(tmp_path, orientation, d, np.random.default_rng(3))
    output = network_output(d, affine_map(d) if affine else None, own)
    write((fixed, moving), output, tmp_path / "out")
    return Left(fixed, moving, output, tmp_path / "out")


# Every orientation in both dimensions; the affine part and the network's own inverse take turns.
CASES = [(case, affine, affine == (k % 2 == 0)) for k, case in enumerate(MATRIX) for affine in (True, False)]
IDS = [f"{NAMES[MATRIX.index(case)]}{'-affine' * affine}{'-own' * own}" for case, affine, own in CASES]
golden = pytest.mark.parametrize("left", CASES, ids=IDS, indirect=True)


@golden
def test_itk_and_apply_move_as_the_writer_did(left: Left) -> None:
    d, affine = left.fixed.spatial_dims, "affine_matrix" in left.output
    moved = load_image(left.folder / "moved.nii.gz")
    assert np.allclose(moved.affine_3d, left.fixed.affine_3d, atol=1e-5)
    transform = load_transform(left.folder / "transform.h5")
    again, inside = ours(transform, left.moving, left.fixed)
    assert inside.mean() > 0.25 and len(transform.parts) == 1 + affine
    np.testing.assert_allclose(again, moved.array, atol=1e-4)
    for name in ("transform.h5", "ddf.nii.gz"):
        theirs = by_itk(itk_transform(left.folder / name, d), left.moving, left.fixed)
        np.testing.assert_allclose(theirs[inside], moved.array[inside], atol=2e-4, err_msg=name)
        paths = {"moving": str(left.moving.path), "fixed": str(left.fixed.path)}
        apply(str(left.folder / name), str(left.folder / "again.nii.gz"), **paths)
        np.testing.assert_allclose(load_image(left.folder / "again.nii.gz").array, moved.array, atol=1e-4, err_msg=name)
    if affine:
        (matrix,) = (part.matrix for part in transform.parts if hasattr(part, "matrix"))
        torch.testing.assert_close(matrix, left.output["affine_matrix"][0], atol=1e-6, rtol=0)


@golden
def test_the_way_back_leads_home(left: Left) -> None:
    d, own = left.fixed.spatial_dims, "inverse_ddf" in left.output
    there, back = (itk_transform(left.folder / f"{name}transform.h5", d) for name in ("", "inverse_"))
    points = lps(inner_points(left.fixed))
    partners = [there.TransformPoint(p.tolist()) for p in points]
    home = np.array([back.TransformPoint(p) for p in partners])
    away = np.linalg.norm(np.array(partners) - points, axis=1)
    missed = np.linalg.norm(home - points, axis=1)
    # The network's inverse is an inverse on its own grid; between the voxels of the files both fields bend.
    assert away.mean() > 0.4 and missed.max() < (0.15 if own else 0.05), (away.mean(), missed.max())

    moved = load_image(left.folder / "inverse_moved.nii.gz")
    assert np.allclose(moved.affine_3d, left.moving.affine_3d, atol=1e-5)
    transform = load_transform(left.folder / "inverse_transform.h5")
    again, inside = ours(transform, left.fixed, left.moving)
    assert inside.mean() > 0.25 and len(transform.parts) == 1 + ("affine_matrix" in left.output)
    np.testing.assert_allclose(again, moved.array, atol=1e-4)
    for name in ("inverse_transform.h5", "inverse_ddf.nii.gz"):
        theirs = by_itk(itk_transform(left.folder / name, d), left.fixed, left.moving)
        np.testing.assert_allclose(theirs[inside], moved.array[inside], atol=2e-4, err_msg=name)
    said = json.loads((left.folder / "metrics.json").read_text())
    assert own == ("inverse_residual_mm" not in said) and said.get("inverse_residual_mm", 0) < 0.01


def test_apply_as_typed_gives_the_moved_scan(tmp_path: Path, repository: Path) -> None:
    fixed, moving = two_scans(tmp_path, "oblique", 3, np.random.default_rng(3))
    write((fixed, moving), network_output(3, affine_map(3), False), tmp_path / "out")
    arguments = ["-m", "common", "apply", "--transform", "out/transform.h5", "--moving", "moving.nii.gz"]
    arguments += ["--fixed", "fixed.nii.gz", "--output", "again.nii.gz"]
    succeed(run_python(arguments, tmp_path, {"PYTHONPATH": str(repository)}))
    again, moved = load_image(tmp_path / "again.nii.gz"), load_image(tmp_path / "out/moved.nii.gz")
    np.testing.assert_allclose(again.array, moved.array, atol=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_scans_of_two_worlds_have_a_way_back(tmp_path: Path, affine: bool) -> None:
    """The files lie 400 mm apart, as from two scanners: the network met them centre on centre.

    What brought them together is the affine part, told or not; a field alone could not be inverted.
    """
    fixed = two_scans(tmp_path, "RAS", 3, np.random.default_rng(3))[0]
    far = np.eye(4)
    far[:3, 3] = 400.0, -250.0, 90.0
    save_image(tmp_path / "moving.nii.gz", fixed.array, far @ fixed.affine)
    moving = load_image(tmp_path / "moving.nii.gz")
    output = network_output(3, far, False)
    output |= {} if affine else {"affine_matrix": None}
    write((fixed, moving), output, tmp_path / "out")
    there, back = (itk_transform(tmp_path / f"out/{name}transform.h5", 3) for name in ("", "inverse_"))
    points = lps(inner_points(fixed))
    home = np.array([back.TransformPoint(there.TransformPoint(p.tolist())) for p in points])
    np.testing.assert_allclose(home, points, atol=0.05)
    np.testing.assert_allclose(load_transform(tmp_path / "out/transform.h5").parts[-1].matrix, far, atol=1e-4)  # type: ignore[union-attr]


def found(folder: Path, shape: tuple[int, ...], affines: tuple[np.ndarray, np.ndarray], ddf: torch.Tensor) -> Any:
    """A pair of files with these affines (fixed, moving), whose field on the fixed file's own grid is ``ddf``."""
    d, pair = len(shape), {}
    for name, affine in zip(("fixed", "moving"), affines, strict=True):
        pair[name] = folder / f"{name}.nii.gz"
        full = np.eye(4)
        full[np.ix_([*range(d), 3], [*range(d), 3])] = affine
        array = np.zeros(shape if d == 3 else (*shape, 1), np.float32)
        nib.save(nib.Nifti1Image(array, full), pair[name])
    grids = {f"{name}_affine": torch.from_numpy(a)[None] for name, a in zip(("fixed", "moving"), affines, strict=True)}
    return RegisteredPair(pair, {"ddf": ddf, **grids}, 0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("d", [2, 3])
def test_the_jacobian_of_a_known_scaling(tmp_path: Path, d: int, mirrored: bool) -> None:
    """x -> diag(1.1, 0.9, 1.25) x in mm, whatever the voxels of the two files and however they are stored."""
    scaling = np.diag([*(1.1, 0.9, 1.25)[:d], 1.0])
    fixed = np.diag([*(2.0, 0.5, 1.5)[:d], 1.0])
    moving = placement("oblique", (7, 6, 5)[:d], (1.0, 3.0, 0.7)[:d], 1.0)
    moving[:, 0] *= -1 if mirrored else 1
    shape = (35, 9, 8)[:d]  # more rows than are computed at a time
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    to_moving = np.linalg.inv(moving) @ scaling @ fixed
    partner = np.tensordot(to_moving[:d, :d], index, axes=1) + to_moving[:d, d].reshape(d, *[1] * d)
    ddf = torch.from_numpy(partner - index).float()[None]
    result = jacobian_map(found(tmp_path, shape, (fixed, moving), ddf))
    assert result.shape == shape
    np.testing.assert_allclose(result.numpy(), np.prod([1.1, 0.9, 1.25][:d]), rtol=1e-4)


def test_the_jacobian_is_that_of_the_whole_field_at_once(tmp_path: Path) -> None:
    ddf = 0.3 * torch.randn(1, 3, 35, 6, 5, generator=torch.Generator().manual_seed(0))
    result = jacobian_map(found(tmp_path, (35, 6, 5), (np.eye(4), np.eye(4)), ddf))
    torch.testing.assert_close(result, jacobian_determinant(ddf)[0])


def test_the_jacobian_counts_the_affine_part(tmp_path: Path) -> None:
    """Files of one grid, a network that says nothing, and an alignment that doubles a length."""
    fixed, moving = two_scans(tmp_path, "LPS", 3, np.random.default_rng(3))
    output = network_output(3, np.diag([2.0, 1.0, 1.0, 1.0]), False)
    write((fixed, moving), output | {"ddf": torch.zeros_like(output["ddf"])}, tmp_path / "out", inverse="none")
    jacobian = load_image(tmp_path / "out/jacobian.nii.gz")
    np.testing.assert_allclose(jacobian.array, 2.0, rtol=1e-4)
    assert grid_of(jacobian).shape == fixed.array.shape
