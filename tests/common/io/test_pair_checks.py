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
"""Bad pairs: each is refused, or let through with a warning, and the message says what was found and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.io import (
    GridError,
    PairError,
    Scan,
    ScanError,
    check_labels,
    check_overlap,
    check_pair,
    load_image,
    save_image,
)
from common.io.scan_checks import check_size, check_window

SHAPE = (18, 20, 17)


def noise(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) * 1000).astype(np.float32)


def nifti(
    path: Path,
    array: np.ndarray | None = None,
    affine: np.ndarray | None = None,
    edit: Callable[[Any], None] | None = None,
) -> Path:
    """A file whose header is as good as its arguments."""
    image = nib.Nifti1Image(noise() if array is None else array, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units("mm")
    if edit is not None:
        edit(image)
    nib.save(image, path)
    return path


def mirrored(image: Any) -> None:
    image.set_sform(np.diag([-1.0, 1, 1, 1]), code=1)
    image.set_qform(np.eye(4), code=1)


def shifted(image: Any) -> None:
    image.set_sform(np.eye(4), code=4)
    image.set_qform(np.array([[1.0, 0, 0, 12], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), code=1)


def nowhere(image: Any) -> None:
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)


def unit(name: str) -> Callable[[Any], None]:
    return lambda image: image.header.set_xyzt_units(name)


def holes(value: float) -> np.ndarray:
    array = noise()
    array[3, 4, 5] = array[0, 0, 0] = value
    return array


def look(folder: Path, **wrong: Any) -> list[str]:
    """What is said of a good fixed scan and a moving one that is as told; ``bad scän.nii.gz`` is its name."""
    options = {key: wrong.pop(key) for key in ("spacing", "stacks", "window", "preset") if key in wrong}
    moving = load_image(nifti(folder / "bad scän.nii.gz", **wrong))
    fixed = load_image(nifti(folder / "good.nii.gz", noise(seed=1)))
    return check_pair(moving, fixed, **options)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    ("metres", {"edit": unit("meter")}, PairError, ["unit is metres", "1 x 1 x 1", "multiply the affine by 1000"]),
    ("micrometres", {"edit": unit("micron")}, PairError, ["micrometres", "expected millimetres", "by 0.001"]),
    (
        "scale",
        {"affine": np.diag([1e-3, 1e-3, 1e-3, 1])},
        PairError,
        ["covers 0.018 x 0.02 x 0.017 mm", "covers 18 x 20 x 17 mm", "factor of 1000", "expected at most 5", "crop"],
    ),
    ("nan", {"array": holes(np.nan)}, PairError, ["2 values that are not finite", "of 6120", "nan_to_num"]),
    ("infinite", {"array": holes(-np.inf)}, PairError, ["2 values that are not finite"]),
    ("constant", {"array": np.full(SHAPE, 7, np.int16)}, PairError, ["every voxel is 7, there is nothing to register"]),
    ("zero", {"array": np.zeros(SHAPE, np.uint8)}, PairError, ["every voxel is 0", "empty mask"]),
    ("one slice", {"array": noise((1, 20, 17))}, PairError, ["(1, 20, 17), one voxel along axis 0", "(x, y, 1)"]),
    ("one slice inside", {"array": noise((18, 1, 17))}, PairError, ["one voxel along axis 1"]),
    (
        "2-D",
        {"array": noise((18, 20, 1))},
        PairError,
        ["is 2-D, with shape (18, 20)", "good.nii.gz is 3-D", "Expected two slices or two volumes"],
    ),
    ("series", {"array": noise((18, 20, 17, 3))}, ScanError, ["(18, 20, 17, 3)", "frame from 0 to 2 (--frame)"]),
    ("vectors", {"array": noise((18, 20, 17, 1, 3))}, ScanError, ["vector image or displacement field"]),
    (
        "colours",
        {"array": np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))},
        ScanError,
        ["holds colours or records", "expected one number a voxel"],
    ),
    ("complex", {"array": noise().astype(np.complex64)}, ScanError, ["complex numbers", "save the magnitude first"]),
    (
        "window",
        {"array": noise() / 1000 + 2000, "window": (-160.0, 240.0), "preset": True},
        PairError,
        ["all values lie between 2000 and 2001", "outside of the window (-160.0, 240.0)", "choose another `intensity`"],
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "parts"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_registered_is_refused(
    tmp_path: Path, wrong: dict[str, Any], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        look(tmp_path, **wrong)
    for part in ("bad scän.nii.gz", *parts):
        assert part in str(caught.value), caught.value


SAID: list[tuple[str, dict[str, Any], list[str]]] = [
    ("mirrored", {"edit": mirrored}, ["disagree on handedness", "left and right may be exchanged", "Find out"]),
    ("shifted", {"edit": shifted}, ["up to 12 mm apart", "the sform is used", "Set both"]),
    ("nowhere", {"edit": nowhere}, ["neither sform nor qform is set", "is unknown", "1 x 1 x 1 mm", "are assumed"]),
    ("tiny", {"array": noise((18, 20, 9))}, ["shape (18, 20, 9), fewer than 16 voxels", "there is little"]),
    ("flat", {"affine": np.diag([1, 1, 5.5, 1])}, ["1 x 1 x 5.5 mm", "a factor above 5", "as stacks"]),
    ("no air", {"window": (-1000.0, 150.0), "preset": True}, ["the smallest value is 0", "air at about -1000"]),
]


@pytest.mark.filterwarnings("ignore:.*neither sform nor qform")
@pytest.mark.parametrize(("odd", "parts"), [s[1:] for s in SAID], ids=[s[0] for s in SAID])
def test_what_is_odd_is_said(tmp_path: Path, odd: dict[str, Any], parts: list[str]) -> None:
    message = look(tmp_path, **odd)[0]
    for part in ("bad scän.nii.gz", *parts):
        assert part in message, message


def test_lengths_that_are_unlikely_are_said_where_the_unit_is_not(tmp_path: Path) -> None:
    tiny = np.diag([1e-3, 1e-3, 1e-3, 1])
    scans = [load_image(nifti(tmp_path / f"{name}.nii", noise(), tiny, unit("unknown"))) for name in "ab"]
    messages = check_pair(scans[0], scans[1])
    assert len(messages) == 2 and "voxels of 0.001 x 0.001 x 0.001 mm, expected between 0.02 and 50" in messages[0]
    assert "in metres or micrometres? If so, write it in mm" in messages[0]


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("as it is", {}),
    ("unknown unit", {"edit": unit("unknown")}),
    ("one of two is flipped", {"affine": np.diag([-1.0, 1, 1, 1])}),
    ("trailing ones", {"array": noise()[..., None]}),
    ("16 bits", {"array": noise().astype(np.int16)}),
    ("bytes", {"array": (noise() / 4).astype(np.uint8)}),
    ("big endian", {"array": noise().astype(">f8")}),
    ("thin slices asked for", {"affine": np.diag([1, 1, 5.5, 1]), "spacing": (2.0, 2.0, 2.0)}),
    ("other place, size and spacing", {"array": noise((30, 41, 19)), "affine": np.diag([0.7, 1.2, 2, 1])}),
]


@pytest.mark.parametrize("good", [g[1] for g in GOOD], ids=[g[0] for g in GOOD])
def test_what_is_well_is_not_talked_about(tmp_path: Path, good: dict[str, Any]) -> None:
    assert look(tmp_path, **good) == []


def test_thick_slices_of_stacks_are_well(tmp_path: Path) -> None:
    assert look(tmp_path, array=noise((18, 20, 4)), affine=np.diag([1.0, 1, 10, 1]), stacks=True) == []


def test_windows_of_what_has_air_or_is_no_ct_are_well(tmp_path: Path) -> None:
    hounsfield = load_image(nifti(tmp_path / "a.nii", noise() - 1000))
    assert check_window(hounsfield, (-1000.0, 150.0), preset=True) == []
    assert check_window(load_image(nifti(tmp_path / "b.nii")), (0.0, 500.0), preset=False) == []


def test_scaled_integers_are_what_they_mean(tmp_path: Path) -> None:
    def slope(image: Any) -> None:
        image.header.set_slope_inter(0.5, -1024)

    scan = load_image(nifti(tmp_path / "a.nii", np.arange(24, dtype=np.int16).reshape(2, 3, 4), edit=slope))
    assert scan.array[1, 2, 3] == 23 * 0.5 - 1024 and scan.array.dtype.kind == "f"


def test_much_memory_is_said_before_voxels_are_read(tmp_path: Path) -> None:
    # One number in memory: the check is about the size, and the values are looked at last.
    array = np.broadcast_to(np.float32(np.nan), (640, 640, 640))
    huge = Scan(array, np.eye(4), tmp_path / "huge.nii", np.eye(4))
    (message,) = check_size(huge)
    assert "262 million voxels, more than 512^3. One image takes 1.0 GB, one field 2.9 GB" in message
    assert "a `spacing` of 1.25 x 1.25 x 1.25 mm or more" in message
    assert check_size(huge, (1.3, 1.3, 1.3)) == []


@pytest.mark.parametrize("zero", [0.0, np.nan])
def test_voxels_without_a_volume_are_refused(tmp_path: Path, zero: float) -> None:
    affine = np.diag([1.0, 1, zero, 1])
    with pytest.raises(PairError, match=r"a.nii: the header's affine .* voxels without a volume"):
        check_pair(Scan(noise(), affine, tmp_path / "a.nii", affine), load_image(nifti(tmp_path / "b.nii")))


def test_slices_of_different_planes_are_said(tmp_path: Path) -> None:
    axial = load_image(save_image(tmp_path / "axial.nii", noise((20, 18)), np.eye(4)))
    turned = np.eye(4)[[0, 2, 1, 3]]
    coronal = load_image(save_image(tmp_path / "coronal.nii", noise((20, 18)), turned))
    (message,) = check_pair(axial, coronal)
    assert "axial.nii (RA)" in message and "coronal.nii (RS) are slices of different planes" in message
    assert check_pair(axial, axial) == []


def at(folder: Path, name: str, shift: float, shape: tuple[int, ...] = SHAPE) -> Scan:
    affine = np.eye(4)
    affine[0, 3] = shift
    return load_image(save_image(folder / name, noise(shape), affine))


@pytest.mark.parametrize("shape", [(18, 20), SHAPE])
def test_scans_that_do_not_meet(tmp_path: Path, shape: tuple[int, ...]) -> None:
    moving, fixed = at(tmp_path, "m.nii", 40, shape), at(tmp_path, "f.nii", 0, shape)
    headers = np.eye(len(shape) + 1)
    with pytest.raises(
        PairError, match=r"m.nii and .*f.nii do not meet in the world as their headers.*\[48.5"
    ) as caught:
        check_overlap(moving, fixed, headers)
    assert "expected some overlap. Let `affine` be 'affine', 'rigid' or 'centre'" in str(caught.value)
    (message,) = check_overlap(moving, fixed, headers, later=True)
    assert "they are brought together by their centres of mass" in message
    bring = headers.copy()
    bring[0, -1] = 40
    assert check_overlap(moving, fixed, bring, "a.tfm") == []
    with pytest.raises(PairError, match=r"do not meet in the world under a.tfm .*Try ':inverse'"):
        check_overlap(moving, fixed, np.linalg.inv(bring), "a.tfm")


@pytest.mark.filterwarnings("ignore:.*neither sform nor qform")
def test_a_place_that_is_unknown_is_no_place(tmp_path: Path) -> None:
    moving, fixed = load_image(nifti(tmp_path / "m.nii", edit=nowhere)), at(tmp_path, "f.nii", 0)
    for pair in ((moving, fixed), (fixed, moving)):
        with pytest.raises(PairError, match=r"m.nii: neither sform nor qform is set.*or let `affine` be 'affine'"):
            check_overlap(*pair, np.eye(4))
        assert check_overlap(*pair, np.eye(4), later=True) == []


def test_little_overlap_is_said(tmp_path: Path) -> None:
    fixed = at(tmp_path, "f.nii", 0)
    (message,) = check_overlap(at(tmp_path, "m.nii", 17), fixed, np.eye(4))
    assert "5.9% of the fixed field of view lies in the moving one" in message
    assert check_overlap(at(tmp_path, "m.nii", 17), fixed, np.eye(4), later=True) == []
    assert check_overlap(at(tmp_path, "n.nii", 9), fixed, np.eye(4)) == []


def test_a_small_scan_between_the_points_that_are_looked_at_is_found(tmp_path: Path) -> None:
    affine = np.eye(4) * [100, 100, 100, 1]
    fixed = Scan(noise(), affine, tmp_path / "f.nii", affine)
    assert "0.0% of the fixed" in check_overlap(at(tmp_path, "m.nii", 60, (4, 4, 4)), fixed, np.eye(4))[0]


def labels(folder: Path, name: str, values: list[float], dtype: Any = np.uint8, **options: Any) -> Scan:
    array = np.zeros(SHAPE, dtype)
    array[: len(values), 0, 0] = values
    return load_image(save_image(folder / f"{name}.nii", array, options.get("affine", np.eye(4))))


def test_labels_that_one_map_lacks_are_said(tmp_path: Path) -> None:
    scans = [load_image(nifti(tmp_path / f"{name}_image.nii")) for name in "mf"]
    maps = [labels(tmp_path, "m", [1, 2, 4]), labels(tmp_path, "f", [1.0, 7.0], np.float32)]
    first, second = check_labels(scans, maps)
    assert "labels [2, 4] of" in first and "m.nii are absent from" in first and "f.nii: their overlap is not" in first
    assert "labels [7] of" in second
    empty = labels(tmp_path, "empty", [])
    (message,) = check_labels(scans, [maps[0], empty])
    assert "empty.nii holds no label, all of its voxels are 0" in message
    assert check_labels(scans, [maps[0], maps[0]]) == []


def test_what_is_no_label_map_is_refused(tmp_path: Path) -> None:
    scans = [load_image(nifti(tmp_path / f"{name}_image.nii")) for name in "mf"]
    good = labels(tmp_path, "good", [1])
    with pytest.raises(ValueError, match=r"half.nii must hold whole numbers"):
        check_labels(scans, [labels(tmp_path, "half", [0.5], np.float32), good])
    with pytest.raises(GridError, match=r"f_image.nii and .*else.nii are not on the same grid: spacing"):
        check_labels(scans, [good, labels(tmp_path, "else", [1], affine=np.diag([1, 1, 2.0, 1]))])


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    whole = nifti(tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "cut off.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.nii.gz").write_text("no image")
    for name, words in (("cut off", "damaged or truncated"), ("text", "")):
        with pytest.raises(ScanError, match=rf"{name}.nii.gz .*{words}"):
            load_image(tmp_path / f"{name}.nii.gz")
    with pytest.raises(FileNotFoundError, match=r"no image at .*absent.nii.gz"):
        load_image(tmp_path / "absent.nii.gz")
