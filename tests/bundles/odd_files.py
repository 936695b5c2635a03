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
"""A plain pair of scans, and files that hold it in every unusual way, or are none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.data.contrast import make_contrast_pair

SIZES = {2: (20, 18), 3: (18, 16, 16)}
PLACE = np.array([[1.2, 0, 0, -8], [0, 1.5, 0, 4], [0, 0, 1, 2], [0, 0, 0, 1.0]])
KEYS = ("moving", "fixed", "moving_label", "fixed_label")

Options = dict[str, Any]
Arrange = Callable[[Path], Options]


def values(dims: int, key: str, scale: int = 250) -> np.ndarray:
    """The plain pair: whole numbers, which every type holds."""
    found: np.ndarray = getattr(make_contrast_pair(SIZES[dims], subject=2), key).numpy()
    if "label" not in key:
        found = np.round(found * scale)
    return found[..., None] if dims == 2 else found


def write(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray = PLACE,
    edit: Callable[[Any], None] | None = None,
) -> str:
    """A NIfTI file, its header as good as its arguments."""
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    if edit is not None:
        edit(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path.name if path.parent.name != "a scän" else f"a scän/{path.name}"


def plain(folder: Path, dims: int, *keys: str) -> Options:
    """The plain pair's files."""
    return {key: write(folder / f"{key}.nii.gz", values(dims, key).astype(np.float32)) for key in keys or KEYS[:2]}


def bad(dims: int, change: Callable[[np.ndarray], np.ndarray], key: str = "moving", **header: Any) -> Arrange:
    """The plain pair with one scan, or one map, changed; it is called ``bad.nii.gz``."""

    def arrange(folder: Path) -> Options:
        needed = KEYS if "label" in key else KEYS[:2]
        array = change(values(dims, key).astype(np.float32))
        return {**plain(folder, dims, *needed), key: write(folder / "bad.nii.gz", array, **header)}

    return arrange


def option(dims: int = 2, **options: Any) -> Arrange:
    """The plain pair with options."""
    return lambda folder: {**plain(folder, dims), **options}


def file_of(content: Callable[[bytes], bytes]) -> Arrange:
    """The moving file's bytes changed."""

    def arrange(folder: Path) -> Options:
        options = plain(folder, 2)
        (folder / "bad.nii.gz").write_bytes(content((folder / "moving.nii.gz").read_bytes()))
        return {**options, "moving": "bad.nii.gz"}

    return arrange


def text_file(name: str, content: str, dims: int = 2, **options: Any) -> Arrange:
    """The plain pair's files and a text file, and no option but those given."""

    def arrange(folder: Path) -> Options:
        plain(folder, dims)
        (folder / name).write_text(content)
        return options

    return arrange


def landmarks(moving: str, fixed: str) -> Arrange:
    """The plain pair with these points."""

    def arrange(folder: Path) -> Options:
        for name, text in (("m.csv", moving), ("f.csv", fixed)):
            (folder / name).write_text(text)
        return {**plain(folder, 2), "moving_points": "m.csv", "fixed_points": "f.csv"}

    return arrange


def in_the_way(folder: Path) -> Options:
    (folder / "out").write_text("a file")
    return plain(folder, 2)


def closed_folder(folder: Path) -> Options:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere; a file in the way of the folder is the case that stands for this one")
    (folder / "out").mkdir(mode=0o555)
    return plain(folder, 2)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[3, 4, 0] = array[5, 5, 0] = value
        return array

    return change


def nowhere(image: Any) -> None:
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)


def unit(name: str) -> Callable[[Any], None]:
    return lambda image: image.header.set_xyzt_units(name)


def colours(array: np.ndarray) -> np.ndarray:
    return np.zeros(array.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


def same(array: np.ndarray) -> np.ndarray:
    return array


def moved_by(*millimetres: float) -> np.ndarray:
    affine = PLACE.copy()
    affine[:3, 3] += millimetres
    return affine


def stored(dtype: str) -> Arrange:
    """The moving scan in another type of numbers."""
    return bad(2, lambda array: array.astype(dtype))


def scaled(folder: Path) -> Options:
    """Stored as other numbers, with a slope and an intercept."""
    array = (values(2, "moving") * 2 + 20).astype(np.int16)
    name = write(folder / "bad.nii.gz", array, edit=lambda image: image.header.set_slope_inter(0.5, -10))
    assert nib.load(folder / name).get_fdata().max() == values(2, "moving").max()
    return {**plain(folder, 2), "moving": name}


def flipped(array: np.ndarray) -> np.ndarray:
    return array[::-1]


def flipped_place(dims: int) -> np.ndarray:
    """Of the image whose first axis is turned around: its determinant is negative."""
    affine = PLACE @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = PLACE[:3, 3] + PLACE[:3, 0] * (SIZES[dims][0] - 1)
    assert np.linalg.det(affine[:3, :3]) < 0
    return affine


def turned() -> np.ndarray:
    """Oblique, and voxels of three lengths."""
    angle = 0.3
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    tilt = np.eye(4)
    tilt[1:3, 1:3] = rotation[:2, :2]
    return rotation @ tilt @ PLACE


def both(dims: int, change: Callable[[str], np.ndarray], affine: np.ndarray = PLACE, **options: Any) -> Arrange:
    """Two scans of their own."""
    return lambda folder: {
        **{key: write(folder / f"{key}.nii.gz", change(key), affine) for key in KEYS[:2]},
        **options,
    }


def sized(*shape: int) -> Callable[[str], np.ndarray]:
    def make(key: str) -> np.ndarray:
        found: np.ndarray = getattr(make_contrast_pair(shape, subject=1), key).numpy() * np.float32(200)
        return found if len(shape) == 3 else found[..., None]

    return make


def different(folder: Path) -> Options:
    """Scans of other shape, spacing, orientation and origin."""
    array = sized(23, 17)("moving").transpose(1, 0, 2)[::-1]
    affine = np.array([[0, 1.1, 0, -9], [-1.3, 0, 0, 28], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    return {**plain(folder, 2), "moving": write(folder / "moving.nii.gz", array, affine), "affine": "affine"}


def in_a_folder(folder: Path) -> Options:
    options = {key: write(folder / "a scän" / f"{key} 扫描 (1).nii.gz", values(2, key)) for key in KEYS[:2]}
    return {**options, "report": True}


def named_like_expressions(folder: Path) -> Options:
    return {
        key: write(folder / f"{mark}{key}.nii.gz", values(2, key)) for key, mark in zip(KEYS[:2], "$@", strict=True)
    }


def results_are_there(folder: Path) -> Options:
    (folder / "out").mkdir()
    (folder / "out/moved.nii.gz").write_text("an older one")
    return plain(folder, 2)


def series(folder: Path) -> Options:
    array = values(3, "moving")
    return {**bad(3, lambda a: np.stack([a * 0, array, a + 1], -1))(folder), "moving_frame": 1}


def maps(folder: Path) -> Options:
    """Maps with whole numbers that are stored as other numbers, one label fewer in one of them."""
    array = values(2, "fixed_label").astype(np.float64)
    few = write(folder / "bad.nii.gz", array % array.max())
    return {**plain(folder, 2, *KEYS), "fixed_label": few, "report": True}
