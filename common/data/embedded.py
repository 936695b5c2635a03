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
"""Writing a cohort that is made rather than collected."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

__all__ = ["grid_of", "save_bytes", "written_whole"]


def grid_of(spatial_dims: int, spatial_size: int | Sequence[int] | None, least: int) -> tuple[int, ...]:
    """The grid of a cohort: ``spatial_size`` along each axis, by default 64 in 2-D and 48 in 3-D.

    Args:
        spatial_dims: 2 or 3.
        spatial_size: one number, one an axis, or None.
        least: the smallest number that is allowed.

    Raises:
        ValueError: for another dimension, or numbers that are too many, too few or too small.
    """
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, found {spatial_dims}")
    if spatial_size is None:
        spatial_size = 64 if spatial_dims == 2 else 48
    size = (spatial_size,) * spatial_dims if isinstance(spatial_size, int) else tuple(int(n) for n in spatial_size)
    if len(size) != spatial_dims or min(size) < least:
        raise ValueError(f"spatial_size needs {spatial_dims} numbers of at least {least}, found {size}")
    return size


@contextmanager
def written_whole(folder: Path, description: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write a cohort into that takes its name when it is complete: no reader ever sees half a cohort.

    Args:
        folder: where the cohort is to lie.
        description: its ``dataset.json``.

    Yields:
        the folder to fill, with ``imagesTr`` and ``labelsTr`` in it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name in ("imagesTr", "labelsTr"):
            (half_made / name).mkdir()
        yield half_made
        (half_made / "dataset.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        half_made.chmod(0o755)
        try:
            os.rename(half_made, folder)
        except OSError:
            # Another process was faster; its files are the same, for they depend on the arguments only.
            if not (folder / "dataset.json").is_file():
                raise
    finally:
        shutil.rmtree(half_made, ignore_errors=True)


def save_bytes(path: Path, image: np.ndarray, affine: np.ndarray) -> None:
    """Write an image in [0,1] as bytes with a slope: an eighth of the size, and every reader has to respect slopes."""
    scan = nib.Nifti1Image(np.round(image * 255).astype(np.uint8), affine)
    # Rounded down, for as float32 1/255 is a little more and 255 times that exceeds 1.
    scan.header.set_slope_inter(np.nextafter(np.float32(1 / 255), np.float32(0)), 0)
    nib.save(scan, path)
