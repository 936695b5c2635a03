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
"""Similarity energies and their gradients in the moved image, in closed form.

An energy is a mean; its ``force`` is the gradient of that mean times the number of voxels it is taken over, so that the
size of a gradient step depends neither on the image's size nor on the batch's. Forces are made of ordinary operations:
training differentiates them, which gives the second derivatives of the energy; inference computes them as they are.
The slopes of the moved image (:mod:`.interpolant`) turn a force into a gradient in the displacement.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.losses import LNCC, MSE, GlobalNCC
from common.losses.checks import check_choice, check_positive
from common.losses.windows import Kernel, window_sums
from common.spatial.exporting import exporting

__all__ = ["ENERGIES", "Energy", "LocalCorrelation", "GlobalCorrelation", "SquaredDifference", "build_energy"]

ENERGIES = ("ssd", "ncc", "lncc")


class Energy(nn.Module):
    """What registration minimises; subclasses give the gradient that goes with their ``loss``.

    Attributes:
        loss: the energy as a loss of (moved, fixed), in which the whole batch counts equally.
    """

    loss: nn.Module

    def forward(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """The energy of two images (B, C, *S), a scalar."""
        value: Tensor = self.loss(moved, fixed)
        return value

    def force(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """The gradient of the energy in ``moved`` times the number of elements of ``moved``.

        Args:
            moved: (B, C, *S), float32 or float64.
            fixed: (B, C, *S).

        Returns:
            (B, C, *S).
        """
        raise NotImplementedError


class SquaredDifference(Energy):
    """The mean squared difference ("ssd"); its force is twice the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MSE()

    def force(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """See :class:`Energy`."""
        return 2.0 * (moved - fixed)


class GlobalCorrelation(Energy):
    """Minus the squared correlation of whole images ("ncc"): the mean over images of -A²/(BC + eps).

    With centred images f and m, A = Σfm, B = Σff and C = Σmm over V voxels, the force is
    -V (2A / (BC + eps)) (f - AB / (BC + eps) m), as in the published GraDIRN.

    Args:
        eps: added to the product of the two sums of squares.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.loss = GlobalNCC(eps)
        self.eps = self.loss.eps

    def force(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """See :class:`Energy`."""
        axes, count = tuple(range(2, moved.ndim)), math.prod(moved.shape[2:])
        moved = moved - moved.mean(axes, keepdim=True)
        fixed = fixed - fixed.mean(axes, keepdim=True)
        # Means for sums, and eps to match: V goes into them, and the product of two sums might leave float32.
        cross = (fixed * moved).mean(axes, keepdim=True)
        own = fixed.square().mean(axes, keepdim=True)
        product = own * moved.square().mean(axes, keepdim=True) + self.eps / count**2
        return (2.0 * cross / product) * (cross * own / product * moved - fixed)


class LocalCorrelation(Energy):
    """Minus the squared correlation in a box around each voxel ("lncc"): the mean of -c²/(ab + eps).

    a and b are the variances of the moved and of the fixed image in the box, c is their covariance. Only voxels inside
    the image count, so the image's edge is no feature. A voxel's force gathers, over the n voxels of every box that
    holds it, -(2c / (ab + eps)) (f - f̄) / n and (2c²b / (ab + eps)²) (m - m̄) / n.

    Args:
        window: voxels along each side of the box, odd.
        eps: added to the product of the variances; damps flat regions.
    """

    def __init__(self, window: int = 9, eps: float = 1e-5) -> None:
        super().__init__()
        self.loss = LNCC(window, eps=eps, border="inside")
        self.kernel, self.eps = Kernel(window), check_positive("LocalCorrelation", "eps", eps)

    def force(self, moved: Tensor, fixed: Tensor) -> Tensor:
        """See :class:`Energy`."""
        # A box's statistics do not depend on the mean of the whole image, but their rounding does.
        axes = tuple(range(2, moved.ndim))
        m, f = (image - image.detach().mean(axes, keepdim=True) for image in (moved, fixed))
        count = self._sum(torch.ones_like(moved[:1, :1])).squeeze(0)
        means = self._sum(torch.stack((m, f, m * m, f * f, m * f)).flatten(1, 2)).unflatten(1, m.shape[:2]) / count
        m_mean, f_mean = means[0], means[1]
        own = means[3] - f_mean * f_mean
        cross = means[4] - m_mean * f_mean
        product = (means[2] - m_mean * m_mean) * own + self.eps
        pull = 2.0 * cross / product / count
        push = pull * cross * own / product
        back = self._sum(torch.stack((pull, push, pull * f_mean - push * m_mean)).flatten(1, 2)).unflatten(
            1, m.shape[:2]
        )
        return back[2] + back[1] * m - back[0] * f

    def _sum(self, maps: Tensor) -> Tensor:
        """Sums over the part of every box that lies inside the image, (K, N, *S)."""
        result: Tensor = (_box_sum if exporting() else _BoxSum.apply)(maps, self.kernel)
        return result


def _box_sum(maps: Tensor, kernel: Kernel) -> Tensor:
    return window_sums(F.pad(maps, (kernel.radius,) * (2 * (maps.ndim - 2))), kernel)


class _BoxSum(torch.autograd.Function):
    """Sums over boxes around every voxel, 0 outside the image; they are their own reverse."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, kernel: Kernel) -> Tensor:
        ctx.kernel = kernel
        return _box_sum(maps, kernel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _BoxSum.apply(gradient, ctx.kernel), None


def build_energy(name: str, *, window: int = 9) -> Energy:
    """The energy of a name.

    Args:
        name: "ssd", "ncc" or "lncc".
        window: of "lncc".

    Raises:
        ValueError: for another name.
    """
    check_choice("build_energy", "similarity", name, ENERGIES)
    if name == "lncc":
        return LocalCorrelation(window)
    return SquaredDifference() if name == "ssd" else GlobalCorrelation()
