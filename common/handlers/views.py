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
"""Colours, names and sides of the views of a registered pair, and how a volume is turned for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

__all__ = [
    "FOLD_COLOUR",
    "GRID_COLOUR",
    "JACOBIAN_COLOURS",
    "LABEL_COLOURS",
    "PLANE_NAMES",
    "PLANE_SIDES",
    "first_channel",
    "to_array",
    "to_ras",
]

Array = NDArray[Any]

# Distinct on grey, and none of them the red of a fold.
LABEL_COLOURS = ("#ffd92f", "#4cc9f0", "#7bd389", "#f78fb3", "#b39ddb", "#ffb074", "#e8e8e8", "#00b4a0")
FOLD_COLOUR = "#ff0000"
GRID_COLOUR = "#4cc9f0"

# Dark where nothing changes, so that the panel does not outshine the images beside it.
JACOBIAN_COLOURS = LinearSegmentedColormap.from_list(
    "shrink_grow", ["#d9b3ff", "#8040c0", "#141414", "#1f9e57", "#a6f5c4"]
)
PLANE_NAMES = ("sagittal", "coronal", "axial")
# What lies at the left, right, bottom and top of each plane, seen as radiologists do: the patient's right on the left.
PLANE_SIDES = (("A", "P", "I", "S"), ("R", "L", "I", "S"), ("R", "L", "P", "A"))


def to_array(value: Any) -> Array:
    """Anything like a tensor, as numpy."""
    if isinstance(value, np.ndarray):
        return value
    tensor = torch.as_tensor(value).detach().cpu()
    tensor = tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
    # numpy has no bfloat16
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def first_channel(image: Any, shape: Sequence[int]) -> Array:
    """The first channel (\\*S), cropped or extended at the far end of each axis to the shape of the fixed grid."""
    volume = to_array(image)
    while volume.ndim > len(shape):
        volume = volume[0]
    volume = volume[tuple(slice(0, n) for n in shape)]
    missing = [(0, n - have) for n, have in zip(shape, volume.shape, strict=True)]
    return np.pad(volume, missing, mode="edge") if any(pad for _, pad in missing) else volume


def to_ras(
    volumes: dict[str, Array], labels: dict[str, Array], field: Array, affine: Array
) -> tuple[dict[str, Array], dict[str, Array], Array, Array]:
    """Turn arrays so that their axes run right, anterior, superior; the field's components turn with its axes."""
    orientation = io_orientation(affine)
    axes = orientation[:, 0].astype(int)
    turned_field = np.empty((3, *(field.shape[1 + int(k)] for k in np.argsort(axes))), dtype=field.dtype)
    for k, (axis, sign) in enumerate(orientation):
        turned_field[int(axis)] = sign * apply_orientation(field[k], orientation)
    turned = [{name: apply_orientation(v, orientation) for name, v in group.items()} for group in (volumes, labels)]
    return turned[0], turned[1], turned_field, voxel_sizes(affine)[np.argsort(axes)]
