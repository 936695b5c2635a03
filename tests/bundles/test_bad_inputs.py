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
"""Scans, headers, options and machines that are not as one would wish, each as a user meets it: at the command line.

What cannot be registered ends with one line that says what was found and what to do, and leaves nothing behind. What is
only unusual is registered like the plain pair that it holds, and is said where it may be meant otherwise.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data.contrast import make_contrast_pair
from tests.bundles.commands import run_bundle, succeed
from tests.bundles.odd_files import (
    KEYS,
    PLACE,
    SIZES,
    Arrange,
    Options,
    bad,
    both,
    closed_folder,
    colours,
    different,
    file_of,
    flipped,
    flipped_place,
    in_a_folder,
    in_the_way,
    landmarks,
    maps,
    moved_by,
    named_like_expressions,
    nowhere,
    option,
    plain,
    results_are_there,
    same,
    scaled,
    series,
    sized,
    stored,
    text_file,
    turned,
    unit,
    values,
    with_value,
    write,
)
from tests.processes import run_python

FAST = {"affine": "none", "report": False, "field_format": "itk", "inverse_field": "none"}


@dataclass(frozen=True)
class Refused:
    """What the last line has to say beside "error:"."""

    arrange: Arrange
    says: tuple[str, ...]


REFUSED: dict[str, Refused] = {
    # Shapes and dimensions
    "a map of another shape": Refused(
        bad(2, lambda a: a[:-2], "moving_label"),
        ("moving.nii.gz and bad.nii.gz are not on the same grid", "(20, 18)", "(18, 18)"),
    ),
    "a map of another spacing": Refused(
        bad(2, same, "moving_label", affine=PLACE * [2, 1, 1, 1]),
        ("moving.nii.gz and bad.nii.gz are not on the same grid", "spacing", "1.2", "2.4"),
    ),
    "a map of another orientation": Refused(
        bad(2, same, "moving_label", affine=PLACE * [-1, 1, 1, 1]), ("bad.nii.gz are not on the same grid",)
    ),
    "a map of another origin": Refused(
        bad(2, same, "moving_label", affine=moved_by(3, 0, 0)), ("bad.nii.gz are not on the same grid", "-8", "-5")
    ),
    "a slice and a volume": Refused(
        lambda folder: {
            "moving": write(folder / "bad.nii.gz", values(2, "moving")),
            "fixed": write(folder / "fixed.nii.gz", values(3, "fixed")),
        },
        ("bad.nii.gz is 2-D", "fixed.nii.gz is 3-D", "cannot be registered"),
    ),
    "a series": Refused(
        bad(3, lambda a: np.stack([a, a, a], -1)), ("bad.nii.gz has shape (18, 16, 16, 3)", "from 0 to 2 (--frame)")
    ),
    "a frame that a series does not have": Refused(
        lambda folder: {**bad(3, lambda a: np.stack([a, a], -1))(folder), "moving_frame": 2},
        ("bad.nii.gz has shape (18, 16, 16, 2)", "no frame 2", "0 to 1"),
    ),
    "a vector image": Refused(
        bad(3, lambda a: np.stack([a] * 3, -1)[:, :, :, None]), ("bad.nii.gz", "vector image or displacement field")
    ),
    "one voxel along an axis": Refused(
        bad(3, lambda a: a[:1]), ("bad.nii.gz has shape (1, 16, 16)", "one voxel along axis 0", "(x, y, 1)")
    ),
    # Numbers
    "colours": Refused(bad(2, colours), ("bad.nii.gz holds colours", "expected one number a voxel")),
    "complex numbers": Refused(
        bad(2, lambda a: a.astype(np.complex64)), ("bad.nii.gz holds complex numbers", "save the magnitude first")
    ),
    "NaN": Refused(
        bad(2, with_value(np.nan)), ("bad.nii.gz: 2 values that are not finite", "of 360", "expected numbers only")
    ),
    "infinity": Refused(bad(2, with_value(np.inf), "fixed"), ("bad.nii.gz: 2 values that are not finite",)),
    "a constant image": Refused(
        bad(2, lambda a: a * 0 + 7), ("bad.nii.gz: every voxel is 7", "nothing to register", "right file")
    ),
    "an image of zeros": Refused(bad(3, np.zeros_like, "fixed"), ("bad.nii.gz: every voxel is 0", "empty mask")),
    "fractions in a map": Refused(
        bad(2, lambda a: a + 0.5, "fixed_label"), ("bad.nii.gz must hold whole numbers", "360 others, such as 0.5")
    ),
    "no CT": Refused(
        lambda folder: {**bad(2, lambda a: a + 3000)(folder), "intensity": "ct_abdomen"},
        ("bad.nii.gz: all values lie between 3000 and", "(-160.0, 240.0)", "choose another `intensity`"),
    ),
    # Files
    "no such file": Refused(option(moving="absent.nii.gz"), ("no image at absent.nii.gz",)),
    "one scan only": Refused(
        lambda folder: {"moving": plain(folder, 2)["moving"]}, ("moving.nii.gz has no partner", "--fixed")
    ),
    "another kind of file": Refused(
        text_file("scan.txt", "text", moving="scan.txt", fixed="fixed.nii.gz"),
        ("scan.txt: unknown image format", ".nii.gz"),
    ),
    "a corrupt file": Refused(file_of(lambda content: b"no image" * 100), ("bad.nii.gz", "no readable NIfTI file")),
    "a truncated file": Refused(
        file_of(lambda content: content[:-40]), ("bad.nii.gz could not be read, it may be damaged or truncated",)
    ),
    "a file cut within its header": Refused(file_of(lambda content: content[:60]), ("bad.nii.gz", "no readable NIfTI")),
    "an empty file": Refused(file_of(lambda content: b""), ("bad.nii.gz", "no readable NIfTI file")),
    # Where scans lie
    "no place, and nothing that finds one": Refused(
        bad(3, same, edit=nowhere), ("bad.nii.gz: neither sform nor qform is set", "let `affine` be 'affine'")
    ),
    "metres": Refused(
        bad(2, same, edit=unit("meter")), ("bad.nii.gz: the header's unit is metres", "expected millimetres", "by 1000")
    ),
    "numbers in metres": Refused(
        bad(3, same, affine=PLACE * [[1e-3], [1e-3], [1e-3], [1]]),
        ("bad.nii.gz covers 0.0216 x 0.024 x 0.016 mm", "covers 21.6 x 24 x 16 mm", "write it in mm"),
    ),
    "fields of view apart": Refused(
        bad(3, same, affine=moved_by(200, 0, 0)),
        ("bad.nii.gz and fixed.nii.gz do not meet in the world", "[202.2", "let `affine` be 'affine'".capitalize()),
    ),
    # Landmarks
    "landmarks of one scan only": Refused(
        text_file("m.csv", "1,2\n", moving="moving.nii.gz", fixed="fixed.nii.gz", moving_points="m.csv"),
        ("--moving_points m.csv has no partner", "give --fixed_points too"),
    ),
    "landmarks without partners": Refused(
        landmarks("1,2\n3,4\n", "1,2\n"),
        ("m.csv", "2 points", "f.csv", "1"),
    ),
    "landmarks that are no numbers": Refused(landmarks("1,2\n", "a,b\n1,c\n"), ("f.csv",)),
    # Lists
    "two pairs of one name": Refused(
        text_file(
            "pairs.csv",
            "moving,fixed,id\nmoving.nii.gz,fixed.nii.gz,a\nfixed.nii.gz,moving.nii.gz,a\n",
            pairs="pairs.csv",
        ),
        ("pairs.csv: the pairs", "are both called 'a'", "give them an `id`"),
    ),
    "a list without a column": Refused(
        text_file("pairs.csv", "moving,target\nmoving.nii.gz,fixed.nii.gz\n", pairs="pairs.csv"),
        ("pairs.csv: unknown columns ['target']", "fixed"),
    ),
    "data that is not here": Refused(
        text_file("none", "", pairs="hippocampus", dataset_dir="nowhere"),
        ("cohort 'hippocampus'", "files are missing under", "nowhere", "Get the data: http"),
    ),
    # Options and machines
    "a misspelt option": Refused(option(afine="rigid"), ("--afine is no option of register", "mean --affine?")),
    "a misspelt value": Refused(option(affine="rigidd"), ("affine 'rigidd'", "none of ['affine', 'rigid'")),
    "a format that there is not": Refused(option(field_format="ants"), ("unknown field_format ['ants']", "'itk'")),
    "an unknown preset": Refused(option(intensity="ct"), ("intensity", "'ct'", "ct_lung")),
    "no size of voxels": Refused(option(spacing=0), ("spacing", "above 0", "got 0")),
    "an unknown bundle": Refused(option(bundle="voxelmorph"), ("--bundle voxelmorph", "dual_stream_pyramid, gradirn")),
    "weights of another bundle": Refused(
        option(checkpoint="{repository}/bundles/gradirn/models/model.pt"),
        ("gradirn/models/model.pt is not a checkpoint of this DualStreamPyramid", "missing"),
    ),
    "volumes for a bundle that ships weights for slices": Refused(
        option(3, bundle="gradirn"), ("gradirn/models/model.pt has weights for 2-D", "GraDIRN is for 3-D", "Choose")
    ),
    "slices for a bundle that ships weights for volumes": Refused(
        option(2, bundle="ssl_pretrain"),
        ("ssl_pretrain/models/model.pt has weights for 3-D", "expected weights for slices"),
    ),
    "no weights": Refused(option(checkpoint="absent.pt"), ("absent.pt",)),
    "a pickle for weights": Refused(
        text_file("bad.pt", "cos\nsystem\n", moving="moving.nii.gz", fixed="fixed.nii.gz", checkpoint="bad.pt"),
        ("bad.pt",),
    ),
    "no GPU": Refused(option(device="cuda"), ("--device cuda: PyTorch has no such GPU", "leave --device out")),
    "a file in the way of the folder": Refused(
        in_the_way, ("results cannot be written to out", "File exists", "choose another output_dir")
    ),
    "a folder that is read-only": Refused(closed_folder, ("results cannot be written to out", "Permission denied")),
}


def register(
    folder: Path, repository: Path, options: Options, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -m common register``, without a GPU.

    Args:
        folder: where it is typed.
        repository: the checkout.
        options: of the command; results go to ``out``.
        before: Python to be run first, in place of another machine.
        environment: variables.
    """
    words = [f"--{key}={value}".replace("{repository}", str(repository)) for key, value in options.items()]
    arguments = ["register", *words, "--output_dir", "out"]
    start = ["-m", "common", *arguments]
    if before:
        line = f"import sys; {before}; sys.argv = ['common', *{arguments!r}]; from common.__main__ import main; main()"
        start = ["-c", line]
    return run_python(start, folder, {"PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": "", **environment})


def left(folder: Path) -> list[str]:
    """What is in the folder of results."""
    return sorted(path.name for path in (folder / "out").rglob("*")) if (folder / "out").is_dir() else []


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_registered_is_refused_in_one_line(name: str, repository: Path, tmp_path: Path) -> None:
    case = REFUSED[name]
    options = {**FAST, **case.arrange(tmp_path)}
    there = {path.name for path in tmp_path.iterdir()}
    result = register(tmp_path, repository, options)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    for words in case.says:
        assert words in last, last
    assert left(tmp_path) == [] and {path.name for path in tmp_path.iterdir()} - {"out"} == there - {"out"}


@dataclass(frozen=True)
class Fine:
    """What is registered.

    Attributes:
        arrange: makes the files, gives the options.
        says: words of the warning that is due.
        like: the dimension of the plain pair that it holds, whose result it must have; None if it is another pair.
        before: see :func:`register`.
    """

    arrange: Arrange
    says: tuple[str, ...] = ()
    like: int | None = 2
    before: str = ""


NETWORK_OFF = (
    "import socket; refuse = lambda *a, **k: (_ for _ in ()).throw(OSError('the network was asked for')); "
    "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse"
)
LITTLE_MEMORY = "import common.io.scan_checks as checks; checks._HUGE = 300"

FINE: dict[str, Fine] = {
    "int16": Fine(stored("i2")),
    "uint8": Fine(stored("u1")),
    "float64": Fine(stored("f8")),
    "big-endian": Fine(stored(">f4")),
    "scl_slope": Fine(scaled),
    "4-D with trailing 1": Fine(bad(2, lambda a: a[..., None])),
    "5-D with trailing 1s": Fine(bad(3, lambda a: a[..., None, None]), like=3),
    "a frame of a series": Fine(series, like=3),
    "a slice stored as (x, y, 1)": Fine(bad(2, lambda a: a[..., 0])),
    "a flipped slice": Fine(bad(2, flipped, affine=flipped_place(2))),
    "a flipped volume": Fine(bad(3, flipped, affine=flipped_place(3)), like=3),
    "a flipped fixed volume": Fine(bad(3, flipped, "fixed", affine=flipped_place(3)), like=3),
    "other order of axes": Fine(both(3, lambda key: values(3, key).transpose(2, 0, 1), PLACE[:, [2, 0, 1, 3]]), like=3),
    "oblique and anisotropic": Fine(both(3, lambda key: values(3, key), turned()), like=3),
    "unit unknown": Fine(bad(2, same, edit=unit("unknown"))),
    "other shape, spacing, orientation and origin": Fine(different, like=None),
    "sizes that nothing divides": Fine(both(3, sized(16, 19, 17)), like=None),
    "tiny": Fine(both(2, sized(9, 11)), ("moving.nii.gz has shape (9, 11)", "fewer than 16 voxels"), None),
    "huge": Fine(option(), ("moving.nii.gz: 0 million voxels, more than", "a `spacing` of"), 2, LITTLE_MEMORY),
    "thick slices": Fine(
        both(3, lambda key: values(3, key), PLACE * [1, 1, 7, 1]), ("voxels of 1.2 x 1.5 x 7 mm", "as stacks"), None
    ),
    "no place": Fine(
        lambda folder: {**bad(3, same, edit=nowhere)(folder), "affine": "centre"},
        ("bad.nii.gz: neither sform nor qform is set", "are assumed"),
        None,
    ),
    "fields of view apart, brought together": Fine(
        lambda folder: {**bad(2, same, affine=moved_by(200, 0, 0))(folder), "affine": "centre"},
        ("bad.nii.gz and fixed.nii.gz do not meet in the world", "brought together by their centres of mass"),
        None,
    ),
    "little in common": Fine(
        bad(2, same, affine=moved_by(23, 0, 0)), ("5.9% of the fixed field of view lies in the moving one",), None
    ),
    "an empty map": Fine(bad(2, np.zeros_like, "fixed_label"), ("bad.nii.gz holds no label, all of its voxels are 0",)),
    "a label that one map lacks, and maps of float64": Fine(
        maps, ("of moving_label.nii.gz are absent from bad.nii.gz", "not measured")
    ),
    "spaces and letters in paths": Fine(in_a_folder),
    "paths that look like expressions": Fine(named_like_expressions),
    "results are there": Fine(results_are_there),
    "no GPU": Fine(option(device="cpu")),
    "no network": Fine(option(), before=NETWORK_OFF),
}


@pytest.fixture(scope="module")
def plain_results(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Callable[[int], np.ndarray]:
    """The moved scan of the plain pair, by dimension."""
    found: dict[int, np.ndarray] = {}

    def result(dims: int) -> np.ndarray:
        if dims not in found:
            folder = tmp_path_factory.mktemp("plain")
            succeed(register(folder, repository, {**FAST, **plain(folder, dims)}))
            found[dims] = nib.as_closest_canonical(nib.load(folder / "out/moved.nii.gz")).get_fdata()
            moving, fixed = (values(dims, key)[..., 0] if dims == 2 else values(dims, key) for key in KEYS[:2])
            result, moving = found[dims].reshape(fixed.shape), moving.reshape(fixed.shape)
            assert np.abs(result - fixed).mean() < np.abs(moving - fixed).mean(), "the plain pair is registered"
        return found[dims]

    return result


@pytest.mark.parametrize("name", FINE)
def test_what_is_only_unusual_is_registered(
    name: str, repository: Path, tmp_path: Path, plain_results: Callable[[int], np.ndarray]
) -> None:
    case = FINE[name]
    options = {**FAST, **case.arrange(tmp_path)}
    result = register(tmp_path, repository, options, case.before)
    text = succeed(result)
    warned = [line for line in text.splitlines() if "WARNING" in line]
    assert bool(warned) == bool(case.says), text
    for words in case.says:
        assert any(words in line for line in warned), warned
    moved, fixed, field = (
        nib.load(path)
        for path in (tmp_path / "out/moved.nii.gz", tmp_path / options["fixed"], tmp_path / "out/ddf.nii.gz")
    )
    assert moved.shape == fixed.shape and np.allclose(moved.affine, fixed.affine, atol=1e-5)
    assert np.isfinite(moved.get_fdata()).all() and np.isfinite(field.get_fdata()).all()
    assert isinstance(json.loads((tmp_path / "out/metrics.json").read_text())["similarity"], list)
    if options["report"]:
        page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
        assert all(words in page for words in case.says)
    if case.like is not None:
        upright = nib.as_closest_canonical(moved).get_fdata()
        assert np.allclose(upright, plain_results(case.like), atol=0.2), "of values up to 250"


def test_subjects_in_two_splits_are_refused_before_training(repository: Path, tmp_path: Path) -> None:
    """Registration trains nothing and reads one split of a list; it is training that has to look."""
    for number, name in enumerate(("a", "b", "c", "other/b")):
        pair = make_contrast_pair(SIZES[2], subject=number)
        write(tmp_path / f"{name}.nii.gz", pair.moving.numpy()[..., None])
    (tmp_path / "copy.nii.gz").write_bytes((tmp_path / "b.nii.gz").read_bytes())
    content = {
        "training": [{"image": "a.nii.gz"}, {"image": "b.nii.gz"}, {"image": "a.nii.gz"}],
        "validation": [{"moving": "a.nii.gz", "fixed": "c.nii.gz"}],
        "test": [{"moving": "c.nii.gz", "fixed": "copy.nii.gz"}],
    }
    (tmp_path / "leaks.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    result = run_bundle("gradirn", repository, "train", datalist=tmp_path / "leaks.json", output_dir=out)
    assert result.returncode != 0 and not out.exists()
    for words in (
        "a.nii.gz: listed 2 times in training",
        "a.nii.gz: subject 'a' of validation is also in training",
        "copy.nii.gz: of test has the same voxels as",
        "c.nii.gz: subject 'c' of test is also in validation",
    ):
        assert words in result.stderr, result.stderr[-3000:]
