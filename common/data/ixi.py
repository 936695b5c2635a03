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
"""The published IXI data are pickles. A pickle is a program, so it is never simply loaded.

``python -m common.data.ixi SOURCE TARGET`` turns ``Train/ Val/ Test/ atlas.pkl`` into NIfTI files, reading them with
an unpickler that can rebuild numpy arrays and nothing else.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from common.data.layouts import natural_key
from common.io import save_image

__all__ = ["UnsafePickleError", "convert_pickles", "read_arrays"]

logger = logging.getLogger(__name__)

# Everything that a pickled numpy array of numbers refers to; numpy.core became numpy._core in numpy 2.
_ALLOWED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
}
_FOLDERS = {"train": "Tr", "val": "Val", "test": "Ts"}


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that asks for more than numpy arrays; the message names the file and what it asked for."""


class _ArrayUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Look a global up only when it is on the list: this is what stops a hostile pickle."""
        if (module, name) not in _ALLOWED:
            raise UnsafePickleError(f"{self._path} asks for '{module}.{name}'; only numpy arrays are accepted")
        if name == "encode":
            return _encode_latin1
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NUMPY_2 else module, name)

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside the file."""
        raise UnsafePickleError(f"{self._path} refers to an object outside the file: {pid!r}")


_NUMPY_2 = int(np.__version__.split(".")[0]) >= 2


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """What protocol 2 writes bytes as. Only this one codec: others run code that knows other formats."""
    if encoding != "latin1" or not isinstance(text, str):
        raise UnsafePickleError(f"bytes in the encoding {encoding!r}, expected 'latin1'")
    return text.encode("latin1")


def read_arrays(path: str | Path) -> tuple[np.ndarray, ...]:
    """Read a pickled tuple or list of numeric arrays.

    Args:
        path: of the pickle.

    Returns:
        the arrays.

    Raises:
        UnsafePickleError: when it asks for anything but numpy arrays; nothing of it has been run then.
        ValueError: when it is damaged or holds something else than a tuple or list of numeric arrays.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, path).load()
    except UnsafePickleError:
        raise
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no readable pickle: {error}") from error
    if not isinstance(content, (tuple, list)) or not all(_is_numeric(array) for array in content):
        raise ValueError(f"{path}: expected a tuple of numeric arrays, found {type(content).__name__}")
    return tuple(content)


def _is_numeric(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "biuf"


def convert_pickles(source_dir: str | Path, target_dir: str | Path, *, progress: bool = True) -> int:
    """Convert IXI's pickles to NIfTI in the folders that ``load_cohort("ixi")`` reads.

    ``Train/subject_0.pkl`` becomes ``imagesTr/subject_0.nii.gz`` (float32) and ``labelsTr/subject_0.nii.gz`` (int16);
    ``Val`` and ``Test`` go to ``imagesVal`` and ``imagesTs``; ``atlas.pkl`` to ``atlas.nii.gz`` and
    ``atlas_label.nii.gz``. The pickles have no header, so every volume gets an identity affine. Files that are there
    already are kept, so that an interrupted run can be continued.

    Args:
        source_dir: folder with ``Train``, ``Val``, ``Test`` and ``atlas.pkl``; any case, any of them.
        target_dir: made if need be.
        progress: show a bar.

    Returns:
        how many pickles were converted or found converted.

    Raises:
        FileNotFoundError: when the source has no pickle in these places.
        UnsafePickleError, ValueError: for a pickle that is not an image and a label of one shape.
    """
    plan = _plan(Path(source_dir), Path(target_dir))
    if not plan:
        raise FileNotFoundError(f"no pickles in {source_dir}: expected Train/*.pkl, Val/*.pkl, Test/*.pkl or atlas.pkl")
    for pickled, image_path, label_path in tqdm(plan, desc="converting", disable=not progress):
        if image_path.is_file() and label_path.is_file():
            continue
        arrays = read_arrays(pickled)
        if len(arrays) != 2 or arrays[0].shape != arrays[1].shape or arrays[0].ndim not in (2, 3):
            shapes = [array.shape for array in arrays]
            raise ValueError(f"{pickled}: expected an image and a label of one shape, found arrays of shapes {shapes}")
        image, label = arrays
        if not np.isfinite(label).all() or (label != np.round(label)).any() or np.abs(label).max() > 32767:
            raise ValueError(f"{pickled}: expected integer labels up to 32767 as its second array")
        eye = np.eye(image.ndim + 1)
        save_image(image_path, image.astype(np.float32), eye)
        save_image(label_path, label.astype(np.int16), eye)
    return len(plan)


def _plan(source: Path, target: Path) -> list[tuple[Path, Path, Path]]:
    plan = []
    for entry in sorted(source.iterdir() if source.is_dir() else []):
        if entry.is_dir() and entry.name.lower() in _FOLDERS:
            suffix = _FOLDERS[entry.name.lower()]
            for pickled in sorted(entry.glob("*.pkl"), key=lambda path: natural_key(path.name)):
                name = f"{pickled.stem}.nii.gz"
                plan.append((pickled, target / f"images{suffix}" / name, target / f"labels{suffix}" / name))
        elif entry.name.lower() in ("atlas.pkl", "altas.pkl"):
            # The published archive has carried both spellings.
            plan.append((entry, target / "atlas.nii.gz", target / "atlas_label.nii.gz"))
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m common.data.ixi", description="Convert IXI's pickles to NIfTI.")
    parser.add_argument("source", help="folder with Train, Val, Test and atlas.pkl")
    parser.add_argument("target", help="folder for the NIfTI files; then the dataset_dir of cohort 'ixi'")
    parsed = parser.parse_args(arguments)
    try:
        count = convert_pickles(parsed.source, parsed.target)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{count} subjects are in {parsed.target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
