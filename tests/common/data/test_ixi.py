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

import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.ixi import UnsafePickleError, convert_pickles, main, read_arrays
from common.io import load_image

IMAGE = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
LABEL = np.random.default_rng(1).integers(0, 256, (4, 5, 6)).astype(np.int16)


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


class Evil:
    """What a hostile data set would hold."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_arrive(tmp_path: Path, protocol: int, order: Any) -> None:
    path = dump(tmp_path / "s.pkl", (np.array(IMAGE, order=order), LABEL.astype(">f8")), protocol)
    image, label = read_arrays(path)
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(label, LABEL)


@pytest.mark.parametrize("old", [True, False])
def test_pickles_of_both_numpy_generations_arrive(tmp_path: Path, old: bool) -> None:
    path = dump(tmp_path / "s.pkl", (IMAGE, LABEL), 2)
    own, other = (
        (b"numpy._core", b"numpy.core") if b"numpy._core" in path.read_bytes() else (b"numpy.core", b"numpy._core")
    )
    wanted = b"numpy.core" if old else b"numpy._core"
    path.write_bytes(path.read_bytes().replace(own, wanted))
    assert wanted in path.read_bytes() and other != own
    np.testing.assert_array_equal(read_arrays(path)[1], LABEL)


def hostile(path: Path, proof: Path) -> dict[str, Any]:
    return {
        "os.system": Evil(os.system, f"touch '{proof}'"),
        "builtins.eval": Evil(eval, f"open({str(proof)!r}, 'w')"),
        "builtins.exec": Evil(exec, f"open({str(proof)!r}, 'w')"),
        "subprocess.Popen": Evil(subprocess.Popen, ["touch", str(proof)]),
        "pathlib.Path.touch": Evil(Path.touch, proof),
    }


@pytest.mark.parametrize(
    "kind", ["os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "pathlib.Path.touch"]
)
@pytest.mark.parametrize("place", ["alone", "beside arrays", "in an object array"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, kind: str, place: str, protocol: int
) -> None:
    proof = tmp_path / "was here"
    evil = hostile(tmp_path, proof)[kind]
    content = {"alone": evil, "beside arrays": (IMAGE, LABEL, evil), "in an object array": (np.array([evil]), LABEL)}
    path = dump(tmp_path / "s.pkl", content[place], protocol)
    with pytest.raises(UnsafePickleError, match=r"s.pkl asks for '.*'; only numpy arrays") as caught:
        read_arrays(path)
    # os.system is posix.system and the like, and old protocols fetch attributes by getattr.
    assert kind.split(".")[-1] in str(caught.value) or "getattr" in str(caught.value) or "Path" in str(caught.value)
    assert not proof.exists()
    if place == "alone" and kind == "os.system":
        pickle.loads(path.read_bytes())
        assert proof.exists(), "the test's own weapon is sharp"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "expected a tuple of numeric arrays, found str"),
        ((IMAGE, "text"), "expected a tuple of numeric arrays"),
        ((np.array(["a"]), LABEL), "expected a tuple of numeric arrays"),
        ({"image": IMAGE}, "found dict"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arrays(dump(tmp_path / "s.pkl", content))


def test_damaged_pickles_are_named(tmp_path: Path) -> None:
    path = dump(tmp_path / "s.pkl", (IMAGE, LABEL))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"s.pkl is no readable pickle"):
        read_arrays(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"s.pkl is no readable pickle"):
        read_arrays(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "IXI_data"
    for folder, names in {"Train": (0, 10), "Val": (2,), "Test": (1, 3)}.items():
        for name in names:
            dump(root / folder / f"subject_{name}.pkl", (IMAGE + name, LABEL.astype(np.float32)))
    dump(root / "atlas.pkl", (IMAGE, LABEL))
    return root


def test_folders_become_what_the_cohort_reads(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "nifti"
    assert convert_pickles(source, target, progress=False) == 6
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*.nii.gz"))
    assert found == sorted(
        ["atlas.nii.gz", "atlas_label.nii.gz"]
        + [f"{kind}{s}.nii.gz" for kind in ("images", "labels") for s in (
            "Tr/subject_0", "Tr/subject_10", "Val/subject_2", "Ts/subject_1", "Ts/subject_3")]
    )  # fmt: skip
    image, label = (load_image(target / f"{kind}Ts/subject_3.nii.gz") for kind in ("images", "labels"))
    np.testing.assert_allclose(image.array, IMAGE + 3)
    np.testing.assert_array_equal(label.array, LABEL)
    assert label.array.dtype == np.int16
    np.testing.assert_array_equal(image.affine, np.eye(4))


def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path) -> None:
    convert_pickles(source, tmp_path / "n", progress=False)
    kept = tmp_path / "n/imagesTr/subject_0.nii.gz"
    stamp = kept.stat().st_mtime_ns
    (tmp_path / "n/labelsVal/subject_2.nii.gz").unlink()
    convert_pickles(source, tmp_path / "n", progress=False)
    assert kept.stat().st_mtime_ns == stamp
    assert (tmp_path / "n/labelsVal/subject_2.nii.gz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((IMAGE,), r"found arrays of shapes \[\(4, 5, 6\)\]"),
        ((IMAGE, LABEL[:2]), r"of one shape, found arrays of shapes \[\(4, 5, 6\), \(2, 5, 6\)\]"),
        ((IMAGE, IMAGE), "integer labels"),
    ],
)
def test_what_is_no_image_with_label_is_named(tmp_path: Path, content: Any, message: str) -> None:
    dump(tmp_path / "Train/subject_5.pkl", content)
    with pytest.raises(ValueError, match=f"subject_5.pkl.*{message}"):
        convert_pickles(tmp_path, tmp_path / "n", progress=False)


def test_the_command_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ixi", str(source), str(tmp_path / "n")])
    monkeypatch.delitem(sys.modules, "common.data.ixi")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("common.data.ixi", run_name="__main__")
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (0, f"6 subjects are in {tmp_path / 'n'}\n")
    assert "converting: 100%" in said.err
    assert main([str(tmp_path / "none"), str(tmp_path / "m")]) == 1
    assert "no pickles in" in capsys.readouterr().err
