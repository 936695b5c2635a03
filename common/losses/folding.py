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
"""The volume that a field folds, as a loss."""

from __future__ import annotations

import math

from torch import Tensor, nn

from common.losses.checks import as_float, check_choice, check_ddf, full_precision
from common.spatial import non_diffeomorphic_volume


class NonDiffeomorphicVolume(nn.Module):
    """Non-diffeomorphic volume: how much space a field turns inside out.

    Around every voxel the grid is cut into simplices; those whose signed volume is negative count (Liu et al., "On
    finite difference Jacobian computation in deformable image registration", IJCV 2024). It is 0, with no gradient, for
    a field without folds, so it asks nothing of a field that is already sound.

    It is of one direction. SITReg takes the mean of the volumes of a field and its inverse: two terms, on ``ddf`` and
    ``inverse_ddf``, each with half the weight. Its published weight 1e-5 is for voxels summed over a batch, of one pair
    in each process, with gradients averaged over processes. That is 1e-5 here with "sum" at any batch size; where
    somebody sums over B pairs, it is B times their weight. With "mean" it is 1e-5 times the inner voxels, for LUMIR's
    160x224x192 ``158 * 222 * 190 * 1e-5 = 66.6``.

    Args:
        reduction: "sum", voxels folded per item, averaged over the batch, or "mean", the same as a share of the voxels
            counted, which does not grow with the image.

    Raises:
        ValueError: for an unknown reduction.
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = check_choice("NonDiffeomorphicVolume", "reduction", reduction, ("mean", "sum"))

    def forward(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:
        """The folded volume.

        Args:
            ddf: (B, d, *S), voxels, at least 3 along every axis.
            mask: (B, 1, *S), where to count, on the fixed grid.

        Returns:
            a scalar, float32 (float64 for a float64 field); 0 where the mask is empty.

        Raises:
            TypeError: when ``ddf`` is no tensor.
            ValueError: when ``ddf`` is no field or too small, or the mask does not fit it.
        """
        check_ddf("NonDiffeomorphicVolume", ddf)
        with full_precision(ddf.device):
            volume = non_diffeomorphic_volume(as_float(ddf), mask)
            if self.reduction == "sum":
                return volume.mean()
            if mask is None:
                return volume.mean() / math.prod(size - 2 for size in ddf.shape[2:])
            inner = mask[(..., *(slice(1, -1) for _ in range(ddf.ndim - 2)))]
            return (volume / as_float(inner).flatten(1).sum(1).clamp_min(1e-6)).mean()
