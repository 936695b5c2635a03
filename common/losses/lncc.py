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
"""Local normalised cross-correlation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.losses.checks import as_float, check_images, full_precision, masked_mean


class LNCC(nn.Module):
    """Negative mean squared local normalised cross-correlation."""

    def __init__(
        self,
        window: int = 9,
        kernel: str = "box",
        form: str = "mean",
        sigma: float | None = None,
        eps: float = 1e-5,
        spatial_dims: int | None = None,
    ) -> None:
        super().__init__()
        self.window, self.kernel, self.form, self.eps, self.spatial_dims = window, kernel, form, eps, spatial_dims
        self.sigma = window / 4.5 if sigma is None else sigma

    def weights(self) -> Tensor:
        """The window along one axis, of sum 1."""
        if self.kernel == "box":
            return torch.full((self.window,), 1.0 / self.window, dtype=torch.float64)
        offsets = torch.arange(self.window, dtype=torch.float64) - self.window // 2
        weights = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        return weights / weights.sum()

    def _filter(self, image: Tensor) -> Tensor:
        weights = self.weights().to(image)
        for axis in range(2, image.ndim):
            radius = self.window // 2
            pads = [0, 0] * (image.ndim - 1 - axis) + [radius, radius]
            padded = functional.pad(image, pads)
            size = image.shape[axis]
            image = sum(weights[k] * padded.narrow(axis, k, size) for k in range(self.window))  # type: ignore[assignment]
        return image

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """Minus the mean squared correlation; see the class."""
        check_images("LNCC", moved, fixed, mask)
        with full_precision(moved.device):
            moved, fixed = as_float(moved), as_float(fixed)
            a_mean, b_mean = self._filter(moved), self._filter(fixed)
            a_var = (self._filter(moved * moved) - a_mean * a_mean).clamp_min(0)
            b_var = (self._filter(fixed * fixed) - b_mean * b_mean).clamp_min(0)
            cov = self._filter(moved * fixed) - a_mean * b_mean
            eps = self.eps / float(self.window ** (moved.ndim - 2)) ** 2 if self.form == "sum" else self.eps
            return -masked_mean((cov * cov / (a_var * b_var + eps)).clamp_max(1), mask)
