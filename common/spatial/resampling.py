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
"""Put a field on a finer or coarser grid of the same field of view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from common.spatial.exporting import same_size
from common.spatial.grid import as_field

__all__ = ["resample_field"]


def resample_field(
    ddf: Tensor, size: Sequence[int], *, align_corners: bool, scale: float | Sequence[float] | None = None
) -> Tensor:
    """Resample a field to another grid, and rescale its values to that grid's voxels.

    Which voxels coincide decides the scale. ``align_corners=True``: the centres of the outermost voxels do, and a step
    of the old grid is ``(n' - 1) / (n - 1)`` of the new. ``align_corners=False``: the outer faces do (voxels that are
    cut in equal parts, as by pooling), and it is ``n' / n``. Displacements beyond the outermost centres repeat.

    Args:
        ddf: (B, d, *S), voxels of its own grid.
        size: the new spatial size.
        align_corners: as above.
        scale: factor of the values (of each axis), for networks that were trained with another one than the geometry's,
            such as 2 for a doubled size and ``align_corners=True``.

    Returns:
        (B, d, *size), voxels of the new grid, float32.

    Raises:
        ValueError: when ``size`` or ``scale`` has another number of axes, or ``size`` is not positive.
    """
    ddf = as_field(ddf)
    old, new = tuple(ddf.shape[2:]), tuple(torch.sym_int(n) for n in size)
    if len(new) != len(old) or min(new) < 1:
        raise ValueError(f"size must be {len(old)} positive numbers for ddf {tuple(ddf.shape)}, got {new}")
    if same_size(old, new) and scale is None:
        return ddf
    if scale is not None:
        factors = [float(scale)] * len(old) if isinstance(scale, (int, float)) else [float(f) for f in scale]
        if len(factors) != len(old):
            raise ValueError(f"scale must be a number or {len(old)} numbers for ddf {tuple(ddf.shape)}, got {factors}")
    elif align_corners:
        # A single voxel has no step to rescale: there the extent of the whole axis decides.
        factors = [(n - 1) / (o - 1) if o > 1 and n > 1 else n / o for o, n in zip(old, new, strict=True)]
    else:
        factors = [n / o for o, n in zip(old, new, strict=True)]
    values = torch.tensor(factors, dtype=ddf.dtype, device=ddf.device).view(1, -1, *(1,) * len(old))
    with torch.autocast(ddf.device.type, enabled=False):
        mode = "bilinear" if len(old) == 2 else "trilinear"
        return interpolate(ddf, size=new, mode=mode, align_corners=align_corners) * values
