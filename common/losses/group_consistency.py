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
"""How far three mappings in a row miss the point they started from, as a loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.losses.checks import as_float, check_ddf, check_spacing, full_precision, spacing_for
from common.spatial import compose

__all__ = ["GroupConsistency"]


class GroupConsistency(nn.Module):
    """Consistency of a group: from image 1 by way of 3 and 2 back to 1 should be no way at all.

    A batch holds triplets, as ``PairDataset(strategy="triplets")`` makes them: items 3k, 3k + 1, 3k + 2 are the pairs
    (moving, fixed) = (1, 2), (2, 3), (3, 1). The first item's field leads from image 2 into image 1, and so on; in a
    row, last item first, the three lead from image 1 round to itself: ``phi12(phi23(phi31(x)))``. The loss is the mean
    over all voxels x of the squared distance of that point to x, and 0 for voxels whose way leaves the image before the
    last field is looked up, since a field is unknown there.

    Distances are in half extents of the image, so that a weight means the same at every image size: a voxel is
    ``2 / max(shape)``, or ``2 * spacing / max(shape * spacing)``.
    Source: SITReg-v2 (Honkamaa and Marttinen), published weight 40 after a ramp. Its three processes each hold one pair
    and treble this loss's gradient against their averaging, which comes to the same as one batch of three.

    Args:
        spacing: voxel size, one number or one an axis; isotropic if not given.

    Raises:
        ValueError: when the spacing is not positive.
    """

    def __init__(self, spacing: Sequence[float] | float | None = None) -> None:
        super().__init__()
        self.spacing = check_spacing("GroupConsistency", spacing)

    def forward(
        self,
        ddf: Tensor,
        inverse_ddf: Tensor | None = None,
        moving_id: Sequence[str] | None = None,
        fixed_id: Sequence[str] | None = None,
    ) -> Tensor:
        """The mean squared length of the cycles' displacements.

        Args:
            ddf: (3T, d, *S), voxels: T triplets, one after the other.
            inverse_ddf: the inverse fields, of the same shape; then the loss is the mean of the cycle above and of the
                one the other way round, ``phi13(phi32(phi21(x)))``.
            moving_id: names of the moving images, to make sure that the batch holds triplets: a sampler that shuffles
                would tear them apart, and any three fields have a cycle of some length.
            fixed_id: of the fixed ones.

        Returns:
            a scalar, float32 (float64 for float64 fields).

        Raises:
            TypeError: when a field is no tensor.
            ValueError: when ``ddf`` is no field or no whole triplets, the inverse has another shape, the names lead to
                no cycle, or the spacing has another number of axes.
        """
        dims = check_ddf("GroupConsistency", ddf)
        if len(ddf) % 3:
            raise ValueError(f"GroupConsistency: a batch of triplets has a multiple of 3 items, got {len(ddf)}")
        if inverse_ddf is not None and (check_ddf("GroupConsistency", inverse_ddf), inverse_ddf.shape)[1] != ddf.shape:
            raise ValueError(
                f"GroupConsistency: ddf has shape {tuple(ddf.shape)}, inverse_ddf {tuple(inverse_ddf.shape)}"
            )
        if moving_id is not None and fixed_id is not None:
            _check_cycles(moving_id, fixed_id)
        spacing = spacing_for("GroupConsistency", self.spacing, dims)
        extent = max(count * size for count, size in zip(ddf.shape[2:], spacing, strict=True))
        with full_precision(ddf.device):
            unit = as_float(ddf).new_tensor([2 * size / extent for size in spacing])
            loss = _missed(as_float(ddf), (0, 1, 2), unit)
            if inverse_ddf is not None:
                loss = (loss + _missed(as_float(inverse_ddf), (2, 1, 0), unit)) / 2
        return loss


def _check_cycles(moving: Sequence[str], fixed: Sequence[str]) -> None:
    """Refuse a batch in which a fixed image is not the moving one of the next pair of its triplet."""
    following = [moving[item + 1 if item % 3 < 2 else item - 2] for item in range(len(moving))]
    if following != list(fixed):
        raise ValueError(
            "GroupConsistency: pairs of a triplet lead from a to b, b to c and c to a, got (moving, fixed) "
            f"{list(zip(moving, fixed, strict=True))}; is there a sampler that shuffles or deals out single items?"
        )


def _missed(ddf: Tensor, order: tuple[int, int, int], unit: Tensor) -> Tensor:
    """Mean squared displacement of cycles that apply the fields of a triplet in ``order``, the last first."""
    outer, middle, inner = (ddf[position::3] for position in order)
    inside = _inside(inner)
    way = compose(middle, inner)
    inside &= _inside(way)
    way = compose(outer, way)
    squared = (way * unit.view(1, -1, *(1,) * (way.ndim - 2))).square().sum(1)
    return (squared * inside).mean()


def _inside(ddf: Tensor) -> Tensor:
    """Whether ``x + ddf(x)`` lies within the grid, (B, *S)."""
    inside = torch.ones_like(ddf[:, 0], dtype=torch.bool)
    for axis, count in enumerate(ddf.shape[2:]):
        steps = torch.arange(count, device=ddf.device, dtype=ddf.dtype)
        position = ddf.detach()[:, axis] + steps.view([-1 if k == axis else 1 for k in range(ddf.ndim - 2)])
        inside &= (position >= 0) & (position <= count - 1)
    return inside
