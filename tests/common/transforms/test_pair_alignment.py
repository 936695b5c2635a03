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
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.io import PairError, Scan, TransformError, load_image, save_image, save_transform
from common.spatial import Affine, Displacement, Grid, SpatialTransform
from common.transforms import PairAlignment

TURN = np.array([[0.96, -0.28, 0.0, 4.0], [0.28, 0.96, 0.0, -2.0], [0.0, 0.0, 1.1, 0.5], [0, 0, 0, 1]])


@pytest.fixture
def scans(tmp_path: Path) -> tuple[Scan, Scan]:
    array = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32)
    oblique = TURN @ np.diag([1.5, 1.0, 2.0, 1.0])
    paths = [save_image(tmp_path / "m.nii", array, oblique), save_image(tmp_path / "f.nii", array[:5], np.eye(4))]
    return load_image(paths[0]), load_image(paths[1])


@pytest.mark.parametrize("name", ["a.tfm", "a.txt", "a.mat"])
def test_files_of_itk_and_ants(tmp_path: Path, scans: tuple[Scan, Scan], name: str) -> None:
    moving, fixed = scans
    path = save_transform(tmp_path / name, SpatialTransform((Affine(torch.from_numpy(TURN)),)), fixed, moving)
    shift = np.eye(4)
    shift[:3, 3] = 1, 2, 3
    other = save_transform(tmp_path / f"b{name}", SpatialTransform((Affine(torch.from_numpy(shift)),)), fixed, moving)

    def known(affine: Any) -> np.ndarray:
        matrix = PairAlignment(affine).known(moving, fixed)
        assert matrix is not None and matrix.dtype == np.float64
        return matrix

    np.testing.assert_allclose(known(path), TURN, atol=1e-6)
    np.testing.assert_allclose(known(f"{path}:inverse"), np.linalg.inv(TURN), atol=1e-6)
    # As for antsApplyTransforms, the first of a list acts first on a point of the fixed scan.
    np.testing.assert_allclose(known([str(path), other]), shift @ TURN, atol=1e-5)


def test_a_matrix_of_flirt(tmp_path: Path, scans: tuple[Scan, Scan]) -> None:
    moving, fixed = scans
    # FLIRT leads from the moving to the fixed image's scaled voxels, whose first axis it counts from the other end when
    # an image is stored neurologically, as both are here.
    scaling = [np.diag([*scan.spacing, 1.0]) for scan in scans]
    for matrix, scan in zip(scaling, scans, strict=True):
        matrix[0, 0], matrix[0, 3] = -scan.spacing[0], (scan.array.shape[0] - 1) * scan.spacing[0]
    to_world = [scan.affine @ np.linalg.inv(matrix) for matrix, scan in zip(scaling, scans, strict=True)]
    flirt = np.linalg.inv(np.linalg.inv(to_world[0]) @ TURN @ to_world[1])
    np.savetxt(tmp_path / "flirt.mat", flirt)
    np.testing.assert_allclose(PairAlignment(tmp_path / "flirt.mat").known(moving, fixed), TURN, atol=1e-9)


def test_what_is_no_affine_map_of_these_scans_is_refused(tmp_path: Path, scans: tuple[Scan, Scan]) -> None:
    moving, fixed = scans
    grid = Grid(fixed.array.shape, torch.from_numpy(fixed.affine))
    field = SpatialTransform((Displacement(torch.zeros(3, *grid.shape), grid),))
    path = save_transform(tmp_path / "field.nii.gz", field, fixed, moving)
    with pytest.raises(
        PairError, match=r"field.nii.gz holds a displacement field, but `affine` takes affine maps only"
    ):
        PairAlignment(path).known(moving, fixed)
    plane = [load_image(save_image(tmp_path / f"{n}2.nii", np.ones((5, 6)), np.eye(4))) for n in "mf"]
    path = save_transform(tmp_path / "3d.tfm", SpatialTransform((Affine(torch.from_numpy(TURN)),)), fixed, moving)
    with pytest.raises(PairError, match=r"3d.tfm is a map in 3-D, but .*f2.nii is 2-D"):
        PairAlignment(path).known(*plane)
    (tmp_path / "none.tfm").write_text("nothing")
    with pytest.raises(TransformError, match=r"none.tfm"):
        PairAlignment(tmp_path / "none.tfm").known(moving, fixed)


def test_wrong_options_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"affine 'afine': no such file, and none of \['affine', 'rigid'"):
        PairAlignment("afine")
    with pytest.raises(FileNotFoundError, match=r"b.tfm:inverse': no such file"):
        PairAlignment([f"{tmp_path}/b.tfm:inverse"])
    with pytest.raises(ValueError, match="affine 'rigid' needs an aligner"):
        PairAlignment("rigid")
    for wrong in (None, [], 3, [2]):
        with pytest.raises(ValueError, match=r"affine must be one of .*, a file or a list of files, got"):
            PairAlignment(wrong)  # type: ignore[arg-type]


def test_headers_alone_and_what_is_sought(scans: tuple[Scan, Scan]) -> None:
    assert np.array_equal(PairAlignment("none").known(*scans), np.eye(4))
    calls: list[Any] = []

    def aligner(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return SimpleNamespace(matrix=TURN, before=0.1, after=0.9, overlap=0.75)

    alignment = PairAlignment("rigid", aligner, "mi")
    assert alignment.known(*scans) is None
    images = [MetaTensor(torch.from_numpy(s.array)[None], affine=torch.from_numpy(s.affine)) for s in scans]
    matrix, said = alignment.find(*images)
    assert np.array_equal(matrix, TURN)
    assert said == "rigid: mi 0.1000 before, 0.9000 after; 75% of the fixed scan's foreground lies in the moving scan"
    assert PairAlignment("none").in_words.startswith("none: ")
    ((moving, fixed, moving_affine, fixed_affine), options) = calls[0]
    assert moving.shape == (1, 1, 6, 7, 8) and fixed.shape == (1, 1, 5, 7, 8) and options["similarity"] == "mi"
    assert options["kind"] == "rigid"
    np.testing.assert_allclose(moving_affine, scans[0].affine)
    np.testing.assert_allclose(fixed_affine, np.eye(4))
