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
"""Composites without ITK: the layout is ITK's own, and ITK, SimpleITK and ANTs read what is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import h5py
import itk
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.io import Scan, TransformError, grid_of, load_transform, load_transforms, save_transform
from common.io.itk_hdf5 import read_hdf5_transform, write_hdf5_transform
from common.spatial import Affine, Displacement, Grid, SpatialTransform
from tests.itk_oracle import MATRIX, NAMES, inner_points, lps, ours, read_by_itk, two_scans


def field_and_affine(grid: Grid, seed: int = 3) -> SpatialTransform:
    rng = np.random.default_rng(seed)
    d = len(grid.shape)
    field = np.stack([gaussian_filter(rng.standard_normal(grid.shape), 3.0) for _ in range(d)])
    field *= 1.5 / np.abs(field).max()
    matrix = np.eye(d + 1)
    matrix[:d, :d] += 0.08 * rng.standard_normal((d, d))
    matrix[:d, d] = rng.uniform(-1, 1, d)
    return SpatialTransform((Displacement(torch.from_numpy(field).float(), grid), Affine(torch.from_numpy(matrix))))


def contents(path: Path) -> dict[str, Any]:
    """Every dataset: the kind of its numbers, its shape, its values."""
    found: dict[str, Any] = {}

    def note(name: str, node: h5py.Dataset | h5py.Group) -> None:
        if isinstance(node, h5py.Dataset):
            text = h5py.check_string_dtype(node.dtype)
            about = (text.encoding, text.length) if text else str(node.dtype)
            found[name] = (about, node.shape, node.asstr()[0] if text else node[()].tolist())

    with h5py.File(path) as file:
        file.visititems(note)
    return found


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("field", [True, False], ids=["field", "affine"])
def test_the_layout_is_that_of_itk(tmp_path: Path, d: int, field: bool) -> None:
    """ITK writes what it has read of ours: the same datasets, of the same kinds, with the same numbers."""
    grid = Grid((5, 6, 7)[:d], torch.diag(torch.tensor([-2.0, 1.5, 1.25, 1.0])[[*range(d), 3]]))
    transform = field_and_affine(grid)
    write_hdf5_transform(tmp_path / "ours.h5", transform if field else SpatialTransform(transform.parts[1:]))
    writer = itk.TransformFileWriterTemplate[itk.F if field else itk.D].New(FileName=str(tmp_path / "theirs.h5"))
    writer.SetUseCompression(True)
    reader = itk.TransformFileReaderTemplate[itk.F if field else itk.D].New(FileName=str(tmp_path / "ours.h5"))
    reader.Update()
    writer.SetInput(reader.GetModifiableTransformList().front())
    writer.Update()
    mine, theirs = contents(tmp_path / "ours.h5"), contents(tmp_path / "theirs.h5")
    about = {"ITKVersion", "HDFVersion", "OSName", "OSVersion"}
    assert {name: value for name, value in mine.items() if name not in about} == {
        name: value for name, value in theirs.items() if name not in about
    }
    assert {name: mine[name][:2] for name in about} == {name: theirs[name][:2] for name in about}


def test_what_itk_wrote_is_read_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A centre of rotation, a translation and the identity, in ITK's order: the last one acts first."""
    affine = itk.AffineTransform[itk.D, 3].New()
    affine.SetCenter([5.0, 6.0, 7.0])
    affine.SetMatrix(itk.matrix_from_array(np.array([[1.1, 0.2, 0], [0, 0.9, 0.1], [-0.3, 0, 1]])))
    affine.SetTranslation([1.0, 2.0, -3.0])
    shift = itk.TranslationTransform[itk.D, 3].New()
    shift.SetOffset([0.5, -1.0, 4.0])
    both = itk.CompositeTransform[itk.D, 3].New()
    for part in (affine, shift, itk.IdentityTransform[itk.D, 3].New()):
        both.AddTransform(part)
    itk.transformwrite([both], str(tmp_path / "t.h5"))
    points = np.random.default_rng(1).uniform(-20, 20, (9, 3))
    expected = [lps(np.array([both.TransformPoint(p.tolist())]))[0] for p in lps(points)]
    monkeypatch.setitem(sys.modules, "itk", None)  # Importing it would fail.
    found = load_transform(tmp_path / "t.h5")
    np.testing.assert_allclose(found.points(torch.from_numpy(points)).numpy(), expected, atol=1e-9)


def test_composites_are_written_without_itk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "itk", None)
    scan = Scan(np.zeros((4, 5, 6), np.float32), np.eye(4), tmp_path / "x", np.eye(4))
    transform = field_and_affine(grid_of(scan))
    back = load_transform(save_transform(tmp_path / "t.h5", transform, scan, scan))
    torch.testing.assert_close(back.parts[0].field, transform.parts[0].field, rtol=0, atol=0)
    torch.testing.assert_close(back.parts[1].matrix, transform.parts[1].matrix, rtol=0, atol=1e-6)


def test_kinds_that_only_itk_knows_are_left_to_it(tmp_path: Path) -> None:
    euler = itk.Euler3DTransform[itk.D].New()
    euler.SetCenter([5.0, 6.0, 7.0])
    euler.SetRotation(0.1, 0.2, 0.3)
    itk.transformwrite([euler], str(tmp_path / "t.h5"))
    assert read_hdf5_transform(tmp_path / "t.h5") is None
    found = load_transform(tmp_path / "t.h5")
    expected = lps(np.array([euler.TransformPoint([1.0, 2.0, 3.0])]))
    np.testing.assert_allclose(found.points(torch.tensor([[-1.0, -2.0, 3.0]])).numpy(), expected, atol=1e-6)


def test_names_of_old_files(tmp_path: Path) -> None:
    """Before ITK 4.12 the names of the numbers lacked an s."""
    write_hdf5_transform(tmp_path / "t.h5", SpatialTransform((Affine(torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))),)))
    with h5py.File(tmp_path / "t.h5", "a") as file:
        for name in list(file["TransformGroup/1"]):
            file["TransformGroup/1"].move(name, name.replace("Transform", "Tranform"))
        file["TransformGroup/1"].move("TranformType", "TransformType")
    assert load_transform(tmp_path / "t.h5").points(torch.ones(1, 3)).tolist() == [[2.0, 3.0, 4.0]]


def test_files_that_are_no_transform_are_refused_by_name(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(TransformError, match=r"other\.h5 cannot be read as an ITK transform"):
        load_transform(tmp_path / "other.h5")
    write_hdf5_transform(tmp_path / "cut.h5", SpatialTransform((Affine(torch.eye(4)),)))
    with h5py.File(tmp_path / "cut.h5", "a") as file:
        del file["TransformGroup/1/TransformParameters"]
    with pytest.raises(TransformError, match=r"cut\.h5 cannot be read"):
        load_transform(tmp_path / "cut.h5")


def test_a_sheared_grid_is_refused(tmp_path: Path) -> None:
    sheared = torch.eye(4)
    sheared[0, 1] = 0.3
    with pytest.raises(TransformError, match="sheared"):
        write_hdf5_transform(tmp_path / "t.h5", field_and_affine(Grid((4, 4, 4), sheared)))


@pytest.mark.parametrize(("orientation", "d"), MATRIX, ids=NAMES)
def test_ants_moves_images_and_points_as_we_do(tmp_path: Path, orientation: str, d: int) -> None:
    """ANTs applies the field and the composite; the field is linear between voxels where ours is exact."""
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    pandas = pytest.importorskip("pandas", reason="antspyx takes points as a table of pandas")
    fixed, moving = two_scans(tmp_path, orientation, d, np.random.default_rng(3))
    transform = field_and_affine(grid_of(fixed))
    moved, inside = ours(transform, moving, fixed)
    assert inside.mean() > 0.25
    points = inner_points(fixed)
    partners = lps(transform.points(torch.from_numpy(points)).numpy())
    table = pandas.DataFrame(lps(points), columns=list("xyz")[:d])
    for name in ("ddf.nii.gz", "transform.h5"):
        file = str(save_transform(tmp_path / name, transform, fixed, moving))
        found = ants.apply_transforms(_ants(ants, fixed), _ants(ants, moving), [file])
        np.testing.assert_allclose(found.numpy()[inside], moved[inside], atol=2e-5, err_msg=name)
        found = ants.apply_transforms_to_points(d, table, [file])
        np.testing.assert_allclose(found.to_numpy(), partners, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("orientation", "d"), [("oblique", 2), ("oblique", 3)])
def test_ants_takes_a_list_in_our_order(tmp_path: Path, orientation: str, d: int) -> None:
    """Warp before affine map, as its registration leaves them; and the other way round, which is another transform."""
    ants = pytest.importorskip("ants", reason="antspyx is not installed")
    fixed, moving = two_scans(tmp_path, orientation, d, np.random.default_rng(3))
    warp, affine = (SpatialTransform((part,)) for part in field_and_affine(grid_of(fixed)).parts)
    files = [str(save_transform(tmp_path / "1Warp.nii.gz", warp, fixed, moving))]
    files += [str(save_transform(tmp_path / "0GenericAffine.mat", affine, fixed, moving))]
    for paths in (files, files[::-1]):
        moved, inside = ours(load_transforms(paths), moving, fixed)
        # Left to itself it inverts an affine map that comes first.
        found = ants.apply_transforms(_ants(ants, fixed), _ants(ants, moving), paths, whichtoinvert=[False, False])
        np.testing.assert_allclose(found.numpy()[inside], moved[inside], atol=2e-5)


def _ants(ants: Any, scan: Scan) -> Any:
    """ANTs' own reader forgets the direction of slices: the header is read by ITK."""
    header = read_by_itk(scan)
    place = {"origin": list(header.GetOrigin()), "spacing": list(header.GetSpacing())}
    return ants.from_numpy(scan.array.astype(np.float32), **place, direction=np.asarray(header.GetDirection()))


@pytest.mark.parametrize(("orientation", "d"), [("oblique", 2), ("oblique", 3)])
def test_simpleitk_reads_it(tmp_path: Path, orientation: str, d: int) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    fixed, moving = two_scans(tmp_path, orientation, d, np.random.default_rng(3))
    transform = field_and_affine(grid_of(fixed))
    theirs = sitk.ReadTransform(str(save_transform(tmp_path / "t.h5", transform, fixed, moving)))
    points = inner_points(fixed)
    expected = [lps(np.array([theirs.TransformPoint(p.tolist())]))[0] for p in lps(points)]
    np.testing.assert_allclose(transform.points(torch.from_numpy(points)).numpy(), expected, atol=2e-5)
