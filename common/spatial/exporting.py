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
"""What is recorded of a network that is exported, by torch.export, torch.onnx or torch.jit.trace.

A recording has to hold for other sizes and on other machines. So it gets PyTorch's own operators, without the blocks,
threads, checks of values and hand-written derivatives that serve the machine at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["exporting", "same_size", "sample_plainly"]


def exporting() -> bool:
    """Whether operations are being recorded for another place; false when they are compiled for this one."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def same_size(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two sizes are equal; where they are left open, whether they are so whatever they become."""
    if not torch.compiler.is_exporting():
        return tuple(first) == tuple(second)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return all(statically_known_true(a == b) for a, b in zip(first, second, strict=True))


def sample_plainly(image: Tensor, ddf: Tensor, padding: str) -> Tensor:
    """``image(x + ddf(x))`` by PyTorch's sampler, in operations that any of the formats can hold.

    Unlike what runs otherwise, it takes a field that is finite for granted.

    Args:
        image: (B, C, *Sm), of the dtype of ``ddf``.
        ddf: (B, d, *Sf), in voxels.
        padding: ``"border"`` or ``"zeros"``.

    Returns:
        (B, C, *Sf).
    """
    grid = _grid(ddf, image.shape[2:])
    return F.grid_sample(image, grid, mode="bilinear", padding_mode=padding, align_corners=False)


def _grid(ddf: Tensor, size: Sequence[int]) -> Tensor:
    """Coordinates of ``x + ddf(x)`` for the sampler: (B, *Sf, d), last axis first, the faces at -1 and 1."""
    dims, axes = ddf.shape[1], []
    for axis in range(dims):
        # In float64: the rounding of these few numbers would be seen in every voxel.
        places = torch.arange(ddf.shape[2 + axis], dtype=torch.float64, device=ddf.device)
        positions = ((2.0 * places + 1.0) / size[axis] - 1.0).to(ddf.dtype)
        axes.append(ddf[:, axis] * (2.0 / size[axis]) + positions.view([-1 if k == axis else 1 for k in range(dims)]))
    return torch.stack(axes[::-1], dim=-1)
