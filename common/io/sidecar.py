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
"""What a transform's numbers mean, in words, in a JSON file beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.io.files import writing

__all__ = ["ROLES", "write_sidecar"]

#: The image whose points a transform takes, and the one it takes them to.
ROLES = ("fixed", "moving")


def write_sidecar(
    path: Path,
    meaning: Mapping[str, Any],
    affines: tuple[np.ndarray, np.ndarray],
    *,
    roles: tuple[str, str] = ROLES,
    formula: str = "x -> x + d(x)",
    about: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write ``<name>.json`` beside a transform ``<name>.nii.gz``, ``<name>.h5``.

    Args:
        path: of the transform.
        meaning: its format, units and axes.
        affines: (4, 4) voxel indices to RAS mm of the image whose points it takes, and of the one it takes them to.
        roles: what these two images are called: of an inverse ``("moving", "fixed")``.
        formula: ``"a point -> the point it is taken to"``.
        about: what else is known, such as the names of the files.
        overwrite: replace an existing file.

    Returns:
        the path of the JSON file.

    Raises:
        FileExistsError: when the file exists and ``overwrite`` is false.
    """
    source, target = roles
    moved = "moved" if roles == ROLES else "inverse_moved"
    point, _, partner = formula.partition(" -> ")
    content = {
        **meaning,
        "direction": f"{source} to {target}: {moved}({point}) = {target}({partner})",
        f"{source}_affine_ras": affines[0].tolist(),
        f"{target}_affine_ras": affines[1].tolist(),
        **(about or {}),
    }
    name = path.name.removesuffix(".gz").rpartition(".")[0] + ".json"
    with writing(path.with_name(name), (".json",), overwrite) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path.with_name(name)
