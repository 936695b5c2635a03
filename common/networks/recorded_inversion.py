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
"""The inverse of a field in a network that is exported: a loop that programs of any format can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from common.spatial.exporting import sample_plainly

__all__ = ["recorded_inversion"]

# A trace holds no loop that ends by itself. So many evaluations bring 6 voxels below 0.01 where a contraction halves.
_TRACED = 10


def recorded_inversion(
    displacement: Tensor, tolerance: float, max_iterations: int, padding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse ``v(x) = -u(x + v(x))`` of a field u by plain iteration, each item until it has converged.

    Args:
        displacement: u, (B, d, *S), voxels; a contraction.
        tolerance: greatest ``|u(x + v(x)) + v(x)|`` to stop at, voxels.
        max_iterations: at most so many evaluations; a trace (TorchScript) always makes ten.
        padding: of u outside its grid, ``"border"`` or ``"zeros"``.

    Returns:
        v (B, d, *S), and for each item (B,): its residual, whether that is within the tolerance, and the evaluations.
    """

    def going(inverse: Tensor, residual: Tensor, count: Tensor) -> Tensor:
        return ((residual > tolerance) & (count < max_iterations)).any()

    def step(inverse: Tensor, residual: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = -sample_plainly(displacement, inverse, padding)
        active = residual > tolerance
        found = (value - inverse).abs().flatten(1).amax(1)
        kept = active.view(-1, *(1,) * (value.ndim - 1))
        return torch.where(kept, value, inverse), torch.where(active, found, residual), count + active.long()

    batch = displacement.shape[0]
    state = (
        -displacement,
        torch.full((batch,), float("inf"), device=displacement.device, dtype=displacement.dtype),
        torch.zeros(batch, dtype=torch.int64, device=displacement.device),
    )
    if torch.jit.is_tracing():
        for _ in range(min(_TRACED, max_iterations)):
            state = step(*state)
    else:
        state = torch.while_loop(going, step, state)
    inverse, residual, count = state
    return inverse, residual, residual <= tolerance, count
