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
"""``common.losses`` against MONAI's losses of the same name, value and gradient.

Run ``python -m benchmarks.losses`` for a Markdown table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai
import torch
from torch import Tensor, nn

from benchmarks.measure import compare, format_table
from benchmarks.spatial import smooth_field
from common.losses import LNCC, BendingEnergy, Diffusion

__all__ = ["measure"]

SIZE = 96
WINDOW = 9


def measure(size: int = SIZE, repeats: int = 7, thread_counts: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Measure local correlation and smoothness, forward and backward.

    Args:
        size: length of every axis.
        repeats: timed repetitions of each, interleaved.
        thread_counts: measure with each of these numbers of threads.

    Returns:
        rows as of :func:`benchmarks.measure.compare`; ``ratio_*`` above 1 means that ours is better.
    """
    version = f"MONAI {monai.__version__}"
    lncc, pair = "LocalNormalizedCrossCorrelationLoss", "LNCC, window 9"
    cases = [
        (f"{pair}, box", our_lncc, their_lncc, ("box", False), lncc),
        (f"{pair}, box, gradient in both images", our_lncc, their_lncc, ("box", True), lncc),
        (f"{pair}, Gaussian", our_lncc, their_lncc, ("gaussian", False), lncc),
        ("diffusion", our_diffusion, their_diffusion, (), "DiffusionLoss"),
        ("bending energy", our_bending, their_bending, (), "BendingEnergyLoss"),
    ]
    return [
        compare(
            what,
            ours,
            theirs,
            (size, *args),
            against=f"{version} {name}",
            size=f"{size}^3",
            warm_up=(16, *args),
            repeats=repeats,
            num_threads=count,
        )
        for what, ours, theirs, args, name in cases
        for count in thread_counts
    ]


def our_lncc(size: int, kernel: str, both: bool) -> Callable[[], object]:
    """Value and gradient of :class:`common.losses.LNCC`."""
    sigma = None if kernel == "box" else WINDOW / 3
    return _value_and_gradient(LNCC(WINDOW, kernel, sigma=sigma), *_images(size, both))


def their_lncc(size: int, kernel: str, both: bool) -> Callable[[], object]:
    """Value and gradient of MONAI's loss with the same window; its Gaussian is ``WINDOW / 3`` wide."""
    kernel_type = "rectangular" if kernel == "box" else "gaussian"
    loss = monai.losses.LocalNormalizedCrossCorrelationLoss(kernel_size=WINDOW, kernel_type=kernel_type)
    return _value_and_gradient(loss, *_images(size, both))


def our_diffusion(size: int) -> Callable[[], object]:
    """Value and gradient of :class:`common.losses.Diffusion`."""
    return _value_and_gradient(Diffusion(), smooth_field(size).requires_grad_())


def their_diffusion(size: int) -> Callable[[], object]:
    """Value and gradient of MONAI's DiffusionLoss, which takes central differences."""
    return _value_and_gradient(monai.losses.DiffusionLoss(), smooth_field(size).requires_grad_())


def our_bending(size: int) -> Callable[[], object]:
    """Value and gradient of :class:`common.losses.BendingEnergy`."""
    return _value_and_gradient(BendingEnergy(), smooth_field(size).requires_grad_())


def their_bending(size: int) -> Callable[[], object]:
    """Value and gradient of MONAI's BendingEnergyLoss."""
    return _value_and_gradient(monai.losses.BendingEnergyLoss(), smooth_field(size).requires_grad_())


def _images(size: int, both: bool) -> tuple[Tensor, Tensor]:
    """A moved image, with a gradient, and a fixed image, with one if ``both``."""
    generator = torch.Generator().manual_seed(0)
    moved, fixed = torch.rand(2, 1, 1, size, size, size, generator=generator)
    return moved.requires_grad_(), fixed.requires_grad_(both)


def _value_and_gradient(loss: nn.Module, *inputs: Tensor) -> Callable[[], object]:
    """A call that returns the loss and its gradient to every input that has one."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def call() -> object:
        value = loss(*inputs)
        return value.detach(), torch.autograd.grad(value, wanted)

    return call


if __name__ == "__main__":
    print(format_table(measure()))
