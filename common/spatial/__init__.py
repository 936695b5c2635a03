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
"""Pure functions on displacement fields.

A field ``ddf`` is (B, d, *S), float32, in voxels of the fixed grid, channel k along array axis k, and pulls back:
``moved(x) = moving(x + ddf(x))``. No function here knows of networks, losses or files.
"""

from __future__ import annotations

from common.spatial.affine import affine_to_ddf, ddf_to_affine
from common.spatial.bspline import bspline_displacement, contraction_bound
from common.spatial.composition import compose, integrate
from common.spatial.digital import (
    digital_jacobian_determinants,
    non_diffeomorphic_volume,
    non_diffeomorphic_volume_percent,
)
from common.spatial.filling import outside_value, warp_scan
from common.spatial.grid import identity_grid
from common.spatial.inversion import Inversion, invert
from common.spatial.jacobian import jacobian_determinant, jacobian_matrix
from common.spatial.labels import warp_labels
from common.spatial.resampling import resample_field
from common.spatial.threads import few_threads
from common.spatial.transform import Affine, Displacement, Grid, SpatialTransform
from common.spatial.warping import warp, warp_points

__all__ = [
    "Affine",
    "Displacement",
    "Grid",
    "Inversion",
    "SpatialTransform",
    "affine_to_ddf",
    "bspline_displacement",
    "compose",
    "contraction_bound",
    "ddf_to_affine",
    "digital_jacobian_determinants",
    "identity_grid",
    "few_threads",
    "integrate",
    "invert",
    "jacobian_determinant",
    "jacobian_matrix",
    "non_diffeomorphic_volume",
    "non_diffeomorphic_volume_percent",
    "outside_value",
    "resample_field",
    "warp",
    "warp_labels",
    "warp_points",
    "warp_scan",
]
