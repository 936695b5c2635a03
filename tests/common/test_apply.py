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
"""Transforms applied to images, labels, probabilities and points, as a user types it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from common.apply import apply, apply_to_image, apply_to_points
from common.data.contrast import make_contrast_pair
from common.io import load_image, load_series, save_field, save_image, save_series, save_transform
from common.spatial import Affine, Grid, SpatialTransform
from tests.bundles.commands import succeed
from tests.processes import run_python

SHIFT = 2  # mm along the first axis, which runs to the left in the fixed scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A moving scan of 1 mm, a fixed one of 2 mm turned around, and a shift of 2 mm to the left between them."""
    moving = np.zeros((12, 10, 8), np.float32)
    moving[3:7, 2:8, 2:6] = np.arange(4 * 6 * 4).reshape(4, 6, 4) + 50
    save_image(tmp_path / "moving.nii.gz", moving, np.eye(4))
    fixed_affine = np.array([[-2.0, 0, 0, 10], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    save_image(tmp_path / "fixed.nii.gz", np.ones((6, 5, 4), np.float32), fixed_affine)
    shift = torch.eye(4)
    shift[0, 3] = -SHIFT
    scans = [load_image(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    save_transform(tmp_path / "shift.mat", SpatialTransform((Affine(shift),)), *scans)
    return tmp_path


def test_an_image_comes_to_the_fixed_grid(folder: Path, repository: Path) -> None:
    arguments = ["-m", "common", "apply", "--transform", "shift.mat", "--moving", "moving.nii.gz"]
    arguments += ["--fixed", "fixed.nii.gz", "--output", "moved.nii.gz"]
    text = succeed(run_python(arguments, folder, {"PYTHONPATH": str(repository)}))
    assert "wrote moved.nii.gz" in text
    moved, moving = (load_image(folder / f"{name}.nii.gz") for name in ("moved", "moving"))
    # Voxel i of the fixed scan lies at 10 - 2 i mm; its partner, 2 mm further to the left, is the voxel 8 - 2 i.
    for i in range(5):
        assert np.array_equal(moved.array[i], moving.array[8 - 2 * i, ::2, ::2]), i
    assert np.array_equal(moved.affine, load_image(folder / "fixed.nii.gz").affine)


def test_turned_around_it_leads_back(folder: Path) -> None:
    paths = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")}
    apply(str(folder / "shift.mat"), str(folder / "a.nii.gz"), **paths)
    there_and_back = [str(folder / "shift.mat"), f"{folder / 'shift.mat'}:inverse"]
    apply(there_and_back, str(folder / "b.nii.gz"), paths["moving"], paths["moving"])
    moving = load_image(paths["moving"])
    assert np.allclose(load_image(folder / "b.nii.gz").array, moving.array)
    apply(
        str(folder / "shift.mat"), str(folder / "c.nii.gz"), moving=paths["moving"], fixed=paths["moving"], inverse=True
    )
    assert np.array_equal(load_image(folder / "c.nii.gz").array[:-2], moving.array[2:])


@pytest.mark.parametrize("kind", ["label", "label_nearest"])
def test_labels_stay_whole_numbers_of_their_type(folder: Path, kind: str) -> None:
    labels = np.zeros((12, 10, 8), np.int16)
    labels[2:6], labels[6:10] = 7, -300
    save_image(folder / "labels.nii.gz", labels, np.eye(4))
    half = torch.eye(4)
    half[0, 3] = 0.3
    scan = load_image(folder / "labels.nii.gz")
    save_transform(folder / "half.tfm", SpatialTransform((Affine(half),)), scan, scan)
    name = str(folder / "labels.nii.gz")
    apply(str(folder / "half.tfm"), str(folder / "out.nii.gz"), moving=name, fixed=name, kind=kind)
    found = nib.load(folder / "out.nii.gz")
    assert found.get_data_dtype() == np.int16
    # 0.3 voxels are nearer to none: everything stays.
    assert np.array_equal(np.asarray(found.dataobj)[:-1], labels[:-1])


def test_probabilities_of_a_series_keep_adding_up(folder: Path) -> None:
    first = np.random.default_rng(0).random((12, 10, 8)).astype(np.float32)
    save_series(folder / "maps.nii.gz", [first, 1 - first], np.eye(4))
    shift = str(folder / "shift.mat")
    apply(
        shift, str(folder / "out.nii.gz"), str(folder / "maps.nii.gz"), str(folder / "fixed.nii.gz"), kind="probability"
    )
    maps = [scan.array for scan in load_series(folder / "out.nii.gz")]
    assert len(maps) == 2 and np.allclose(maps[0] + maps[1], 1)
    assert np.allclose(maps[0][4], first[0, ::2, ::2])
    assert np.allclose(maps[0][5], 1), "outside is background"


def test_air_is_air_beyond_the_frame_of_a_ct() -> None:
    image = torch.full((1, 4, 4), -1000.0)
    shift = torch.eye(3)
    shift[0, 2] = 2.5
    grid = Grid((4, 4), torch.eye(3))
    moved = apply_to_image(image, SpatialTransform((Affine(shift),)), grid, grid, fill=-1000.0)
    assert torch.equal(moved, image)


def test_the_lowest_value_fills_where_none_is_named(folder: Path) -> None:
    save_image(folder / "ct.nii.gz", np.full((12, 10, 8), -1000, np.int16), np.eye(4))
    name = str(folder / "ct.nii.gz")
    apply(str(folder / "shift.mat"), str(folder / "out.nii.gz"), moving=name, fixed=name)
    assert load_image(folder / "out.nii.gz").array.min() == load_image(folder / "out.nii.gz").array.max() == -1000
    apply(str(folder / "shift.mat"), str(folder / "out.nii.gz"), moving=name, fixed=name, fill=5.0)
    assert load_image(folder / "out.nii.gz").array.max() == 5


@pytest.mark.parametrize(
    ("space", "point", "partner", "back"),
    [
        # A point at (6, 4, 2) mm: voxel (2, 2, 1) of the fixed scan; its partner at (4, 4, 2), also that voxel.
        ("ras", "6,4,2", [4, 4, 2], [8, 4, 2]),
        ("lps", "-6,-4,2", [-4, -4, 2], [-8, -4, 2]),
        ("voxel", "2,2,1", [4, 4, 2], [3, 1, 0.5]),
    ],
)
def test_points_by_hand(folder: Path, space: str, point: str, partner: list[float], back: list[float]) -> None:
    """Of the fixed scan along the arrow, 2 mm to the left; of the moving scan against it, 2 mm to the right."""
    (folder / "points.csv").write_text(f"x,y,z,name\n{point},nose\n")
    scans = {name: str(folder / f"{name}.nii.gz") for name in ("fixed", "moving")}
    arguments = str(folder / "shift.mat"), str(folder / "out.csv")
    apply(*arguments, points=str(folder / "points.csv"), space=space, of="fixed", **scans)
    numbers = (folder / "out.csv").read_text().splitlines()[1].split(",")
    assert [float(n) for n in numbers[:3]] == partner and numbers[3] == "nose"
    apply(*arguments, points=str(folder / "points.csv"), space=space, of="moving", **scans)
    numbers = (folder / "out.csv").read_text().splitlines()[1].split(",")
    assert np.allclose([float(n) for n in numbers[:3]], back)


def test_points_meet_where_the_image_shows_them(tmp_path: Path) -> None:
    """A bright voxel of the moving image, a landmark on it, a field: both arrive at one place."""
    moving = np.zeros((15, 15), np.float32)
    moving[9, 5] = 1.0
    save_image(tmp_path / "image.nii.gz", moving, np.diag([1.5, 1.5, 1.0]))
    ddf = torch.zeros(1, 2, 15, 15)
    ddf[:, 0], ddf[:, 1] = 3.0, -2.0
    save_field(tmp_path / "field.nii.gz", ddf, np.diag([1.5, 1.5, 1.0]))
    (tmp_path / "points.csv").write_text("9,5\n")
    image = str(tmp_path / "image.nii.gz")
    apply(str(tmp_path / "field.nii.gz"), str(tmp_path / "moved.nii.gz"), moving=image, fixed=image)
    apply(
        str(tmp_path / "field.nii.gz"),
        str(tmp_path / "out.csv"),
        moving=image,
        fixed=image,
        points=str(tmp_path / "points.csv"),
        space="voxel",
        of="moving",
    )
    bright = np.argwhere(load_image(tmp_path / "moved.nii.gz").array > 0.9).tolist()
    assert bright == [[6, 7]]
    assert np.allclose(np.loadtxt(tmp_path / "out.csv", delimiter=","), bright[0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to carry"),
        ({"moving": "moving.nii.gz"}, "--fixed names the image whose grid"),
        ({"moving": "moving.nii.gz", "fixed": "fixed.nii.gz", "kind": "mask"}, "unknown --kind 'mask'"),
        ({"moving": "moving.nii.gz", "fixed": "fixed.nii.gz", "kind": "label"}, "must hold whole numbers"),
        ({"points": "points.csv", "of": "both"}, "--of must be 'fixed' or 'moving'"),
        ({"points": "points.csv", "space": "voxel"}, "the image whose voxels they are"),
        ({"points": "points.csv", "device": "gpu"}, "--device gpu is none that PyTorch knows"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    folder: Path, options: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "points.csv").write_text("1,2,3\n")
    save_image(folder / "moving.nii.gz", np.full((12, 10, 8), 0.5, np.float32), np.eye(4))
    with pytest.raises(ValueError, match=message):
        apply("shift.mat", "out.nii.gz", **options)  # type: ignore[arg-type]
    assert not list(folder.glob("out*"))


def test_a_form_that_needs_both_images_asks_for_them(folder: Path) -> None:
    np.savetxt(folder / "flirt.mat", np.eye(4))
    (folder / "points.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match="without both images"):
        apply(str(folder / "flirt.mat"), str(folder / "out.csv"), points=str(folder / "points.csv"))


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A folder with two scans of different grids, one mirrored, and in ``out`` what their registration left."""
    folder = tmp_path_factory.mktemp("registered")
    pair = make_contrast_pair((22, 20, 18), subject=4)
    mirrored = np.array([[-1.2, 0, 0, 30], [0, 1.2, 0.1, -12], [0, -0.1, 1.2, 5], [0, 0, 0, 1]])
    for role, affine in (("moving", mirrored), ("fixed", np.diag([1.0, 1.3, 1.1, 1]))):
        for key in (role, f"{role}_label"):
            array = getattr(pair, key).numpy()[:: -1 if role == "moving" else 1]
            save_image(folder / f"{key}.nii.gz", array if "label" in key else 200 * array, affine)
    options = ["--affine", "centre", "--report", "False", "--output_dir", "out"]
    for key in ("moving", "fixed", "moving_label", "fixed_label"):
        options += [f"--{key}", f"{key}.nii.gz"]
    succeed(run_python(["-m", "common", "register", *options], folder, {"PYTHONPATH": str(repository)}))
    return folder


TRANSFORMS = pytest.mark.parametrize("name", ["transform.h5", "ddf.nii.gz"])


def carried(folder: Path, name: str, output: Path, **options: str) -> Path:
    """What ``apply`` makes of a file with a transform that the registration left."""
    images = {key: str(folder / f"{key}.nii.gz") for key in ("moving", "fixed")}
    given = {key: str(folder / value) if key == "moving" else value for key, value in options.items()}
    apply(str(folder / "out" / name), str(output), **{**images, **given})  # type: ignore[arg-type]
    return output


@TRANSFORMS
def test_maps_follow_a_registration(registered: Path, tmp_path: Path, name: str) -> None:
    moved = load_image(registered / "out/moved_label.nii.gz").array
    label = {"moving": "moving_label.nii.gz"}
    whole = load_image(carried(registered, name, tmp_path / "a.nii.gz", kind="label", **label)).array
    assert (whole == moved).mean() > 0.999 and len(np.unique(moved)) > 2
    nearest = load_image(carried(registered, name, tmp_path / "b.nii.gz", kind="label_nearest", **label)).array
    assert 0.9 < (nearest == moved).mean() < 1 and set(np.unique(nearest)) <= set(np.unique(moved))

    source = load_image(registered / "moving_label.nii.gz")
    classes = [0, *np.unique(source.array[source.array > 0])]
    save_series(registered / "shares.nii.gz", [(source.array == k).astype(np.float32) for k in classes], source.affine)
    shares = carried(registered, name, tmp_path / "c.nii.gz", kind="probability", moving="shares.nii.gz")
    stack = np.stack([scan.array for scan in load_series(shares)])
    assert stack.shape == (len(classes), *moved.shape) and np.allclose(stack.sum(0), 1, atol=1e-5)
    assert (np.array(classes)[stack.argmax(0)] == moved).mean() > 0.995


@TRANSFORMS
def test_points_follow_a_registration(registered: Path, tmp_path: Path, name: str) -> None:
    """In three spaces, there and back; and the images show the same at a point and its partner."""
    fixed, moving = (load_image(registered / f"{key}.nii.gz") for key in ("fixed", "moving"))
    voxels = np.array([[9, 8, 7], [12, 11, 9], [10, 5, 12], [7, 12, 6]], dtype=np.float64)
    world = voxels @ fixed.affine[:3, :3].T + fixed.affine[:3, 3]
    given = {"voxel": voxels, "ras": world, "lps": world * [-1, -1, 1]}
    partners: dict[str, np.ndarray] = {}
    for space, points in given.items():
        for of, csv in (("fixed", points), ("moving", None)):
            table = tmp_path / f"{space}.csv"
            np.savetxt(table, partners[space] if csv is None else csv, delimiter=",")
            options = {"points": str(table), "space": space, "of": of}
            found = np.loadtxt(carried(registered, name, tmp_path / "out.csv", **options), delimiter=",")
            if of == "fixed":
                partners[space] = found
            else:
                np.testing.assert_allclose(found, points, atol=2e-4)
    to_voxels = np.linalg.inv(moving.affine)
    np.testing.assert_allclose(partners["lps"], partners["ras"] * [-1, -1, 1], atol=1e-3)
    in_voxels = partners["ras"] @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    np.testing.assert_allclose(partners["voxel"], in_voxels, atol=1e-3)
    assert np.abs(partners["ras"] - world).max() > 5, "the scans lie apart"
    moved = load_image(registered / "out/moved.nii.gz").array
    there = map_coordinates(moving.array.astype(float), partners["voxel"].T, order=1)
    np.testing.assert_allclose(there, moved[tuple(voxels.astype(int).T)], atol=0.5)  # of values up to 200


def zigzag() -> SpatialTransform:
    """Runs forth, back by 2 and forth again along the first axis: between 8 and 10 mm three points go to one."""
    ddf = torch.zeros(1, 2, 21, 5)
    ddf[:, 0] = torch.tensor([0.0] * 10 + [0, -2, -4] + [-4.0] * 8)[:, None]
    grid = Grid((21, 5), torch.eye(3))
    return SpatialTransform.from_ddf(ddf, grid, grid)


def test_points_at_a_fold_go_to_one_of_their_partners() -> None:
    points = torch.tensor([[6.0, 2.0], [8.5, 2.0], [9.5, 1.0], [14.25, 2.0]], dtype=torch.float64)
    partners = apply_to_points(points, zigzag(), "moving")
    torch.testing.assert_close(zigzag().points(partners), points, atol=1e-3, rtol=0)
    assert torch.allclose(partners[[0, 3]], torch.tensor([[6.0, 2.0], [18.25, 2.0]], dtype=torch.float64), atol=1e-3)


def test_points_that_are_not_followed_back_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ddf = 0.3 * torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    ddf[..., :5, :] = 0
    grid = Grid((9, 9), torch.eye(3))
    rough = SpatialTransform.from_ddf(ddf, grid, grid)
    points = torch.tensor([[2.5, 2.5], [6.5, 5.5]], dtype=torch.float64)
    torch.testing.assert_close(rough.points(apply_to_points(points, rough, "moving")), points, atol=1e-3, rtol=0)
    monkeypatch.setattr("common.apply._STEPS", 1)
    with pytest.warns(UserWarning, match=r"1 of 2 points .* could not be followed back, .* off, in rows \[2\]"):
        apply_to_points(points, rough, "moving")


def test_points_of_the_moving_scan_go_by_the_written_inverse_too(registered: Path, tmp_path: Path) -> None:
    world = np.array([[20.0, 0.0, 15.0], [15.0, 2.0, 12.0]])
    np.savetxt(tmp_path / "points.csv", world, delimiter=",")
    points = {"points": str(tmp_path / "points.csv")}
    back = carried(registered, "transform.h5", tmp_path / "a.csv", of="moving", **points)
    other = carried(registered, "inverse_transform.h5", tmp_path / "b.csv", of="fixed", **points)
    first, second = (np.loadtxt(path, delimiter=",") for path in (back, other))
    assert np.abs(first - world).max() > 2
    np.testing.assert_allclose(first, second, atol=0.1)
