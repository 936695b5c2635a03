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
"""Similarity of whole images: squared difference, global correlation, mutual information."""

from __future__ import annotations

import torch
from monai.losses import GlobalMutualInformationLoss
from torch import Tensor, nn

from common.losses.checks import as_float, check_images, full_precision, masked_mean, plain


class MSE(nn.Module):
    """Mean squared difference of two images, over a mask if there is one."""

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of (moved - fixed)².

        Args:
            moved: (B, C, *S).
            fixed: (B, C, *S).
            mask: (B or 1, C or 1, *S), weights of the voxels; voxels of weight 0 do not matter.

        Returns:
            a scalar, float32 (float64 for float64 images).

        Raises:
            ValueError: when shapes differ.
        """
        check_images("MSE", moved, fixed, mask)
        with full_precision(moved.device):
            difference = as_float(moved) - as_float(fixed)
            if mask is not None:
                difference = difference.where(plain(mask) > 0, 0.0)  # not a product, which would let NaN through
            return masked_mean(difference * difference, mask)


class GlobalNCC(nn.Module):
    """Negative squared normalised cross-correlation of whole images, averaged over batch and channels.

    For every image -A²/(B·C + eps) with the centred sums A = Σ m̂f̂, B = Σ m̂², C = Σ f̂², as in the published GraDIRN.
    It is 0 for a constant image and never leaves [-1, 0].

    Args:
        eps: added to the product of the two sums of squares.

    Raises:
        ValueError: when ``eps`` is not positive.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f"GlobalNCC: eps must be positive, got {eps}")
        self.eps = float(eps)

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Minus the squared correlation.

        Args:
            moved: (B, C, *S).
            fixed: (B, C, *S).
            mask: (B or 1, C or 1, *S), weights of the voxels; voxels of weight 0 do not matter.

        Returns:
            a scalar in [-1, 0], float32 (float64 for float64 images).

        Raises:
            ValueError: when shapes differ.
        """
        check_images("GlobalNCC", moved, fixed, mask)
        with full_precision(moved.device):
            first, second = as_float(moved).flatten(2), as_float(fixed).flatten(2)
            if mask is None:
                weights = first.new_ones(())
                count = first.new_tensor(float(first.shape[2]))
            else:
                weights = plain(mask).to(first.dtype).flatten(2).expand_as(first)
                count = weights.sum(2, keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)
                first, second = first.where(weights > 0, 0.0), second.where(weights > 0, 0.0)
            first = first - (weights * first).sum(2, keepdim=True) / count
            second = second - (weights * second).sum(2, keepdim=True) / count
            # Means rather than sums, and eps scaled to match: the square of a sum over a large scan leaves float32.
            cross = (weights * first * second).sum(2, keepdim=True) / count
            product = (weights * first * first).sum(2, keepdim=True) / count
            product = product * ((weights * second * second).sum(2, keepdim=True) / count)
            correlation = cross * cross / (product + self.eps / count**2)
            return -correlation.clamp_max(1.0).mean()


class MutualInformation(nn.Module):
    """Negative mutual information of two images: MONAI's Parzen estimate, with a mask and an intensity range.

    Args:
        num_bins: bins of the joint histogram along each axis.
        kernel_type: "gaussian" or "b-spline", see ``monai.losses.GlobalMutualInformationLoss``.
        sigma_ratio: width of the Gaussian in bins.
        intensity_range: the intensities that the first and the last bin stand for. The Gaussian estimate counts what
            lies outside as lying at the border.

    Raises:
        ValueError: when ``intensity_range`` is empty.
    """

    def __init__(
        self,
        num_bins: int = 23,
        kernel_type: str = "gaussian",
        sigma_ratio: float = 0.5,
        intensity_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.low, self.high = (float(bound) for bound in intensity_range)
        if not self.low < self.high:
            raise ValueError(f"MutualInformation: intensity_range must rise, got {tuple(intensity_range)}")
        self.estimate = GlobalMutualInformationLoss(kernel_type=kernel_type, num_bins=num_bins, sigma_ratio=sigma_ratio)

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Minus the mutual information in nats, averaged over the batch.

        Args:
            moved: (B, C, *S).
            fixed: (B, C, *S).
            mask: (B or 1, C or 1, *S), voxels that are not 0 count.

        Returns:
            a scalar.

        Raises:
            ValueError: when shapes differ, or the mask leaves no voxel of an item.
        """
        check_images("MutualInformation", moved, fixed, mask)
        with full_precision(moved.device):
            # MONAI's bin centres are float32, so a float64 image is estimated in float32 too.
            first, second = ((plain(image).float() - self.low) / (self.high - self.low) for image in (moved, fixed))
            if mask is None:
                return self.estimate(first, second)
            inside = (plain(mask) != 0).expand_as(first)
            items = [self._one(first[i], second[i], inside[i], i) for i in range(first.shape[0])]
            return torch.stack(items).mean()

    def _one(self, moved: Tensor, fixed: Tensor, inside: Tensor, index: int) -> Tensor:
        """The estimate of one item, from the voxels in the mask: their number differs between items."""
        if not bool(inside.any()):
            raise ValueError(f"MutualInformation: the mask of batch item {index} holds no voxel")
        return self.estimate(moved[inside][None, None], fixed[inside][None, None])
