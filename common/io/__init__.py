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
"""Scans and transforms in and out: one module for each kind of file."""

from __future__ import annotations

from common.io.common_grid import common_grid
from common.io.fields import load_field, save_field
from common.io.grids import GridError, grid_difference, require_same_grid, same_grid
from common.io.headers import image_dims
from common.io.label_maps import label_values, load_label_map, require_label_map
from common.io.pair_checks import PairError, check_labels, check_overlap, check_pair
from common.io.pair_folders import PairFolders
from common.io.pair_grid import pair_grid
from common.io.pair_points import load_pair_points
from common.io.scans import Scan, ScanError, load_image, load_series, save_image, save_series
from common.io.transforms import TransformError, grid_of, load_transform, load_transforms, save_transform

__all__ = [
    "GridError",
    "PairError",
    "PairFolders",
    "Scan",
    "ScanError",
    "TransformError",
    "check_labels",
    "check_overlap",
    "check_pair",
    "common_grid",
    "grid_difference",
    "grid_of",
    "image_dims",
    "label_values",
    "load_field",
    "load_image",
    "load_label_map",
    "load_pair_points",
    "load_series",
    "load_transform",
    "load_transforms",
    "pair_grid",
    "require_label_map",
    "require_same_grid",
    "same_grid",
    "save_field",
    "save_image",
    "save_series",
    "save_transform",
]
