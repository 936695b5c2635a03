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
"""Small cohorts on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.io import save_image

SHAPE = (6, 5, 4)


def write_subject(root: Path, name: str, seed: int, affine: np.ndarray | None = None) -> dict[str, str]:
    """One image and its label map with the values 0, 1, 2."""
    rng = np.random.default_rng(seed)
    affine = np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine
    save_image(root / f"imagesTr/{name}.nii.gz", rng.random(SHAPE).astype(np.float32), affine)
    save_image(root / f"labelsTr/{name}.nii.gz", rng.integers(0, 3, SHAPE).astype(np.uint8), affine)
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset JSON beside the images and return its path."""

    def write(**content: Any) -> Path:
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def four(tmp_path: Path) -> list[dict[str, str]]:
    """Four subjects on disk, as a JSON names them."""
    return [write_subject(tmp_path, f"case_{number:04d}_0000", number) for number in range(4)]
