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
"""``common.spatial`` against what a MONAI user would take: ``Warp``, ``DVF2DDF``, and one-hot maps for labels.

Run ``python -m benchmarks.spatial`` for a Markdown table. Times are forward plus backward where there is a backward.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import monai
import torch
from torch import Tensor

from benchmarks.measure import compare, format_table
from common.spatial import identity_grid, integrate, warp, warp_labels

__all__ = ["measure"]

SIZE = 96
LABELS = 35


def measure(size: int = SIZE, repeats: int = 7, thread_counts: tuple[int, ...] = (1, 2)) -> list[dict[str, Any]]:
    """Measure warping, integrating and label warping, forward and backward.

    Args:
        size: length of every axis.
        repeats: timed repetitions of each, interleaved.
        thread_counts: measure with each of these numbers of threads.

    Returns:
        rows as of :func:`benchmarks.measure.compare`; ``ratio_*`` above 1 means that ours is better.
    """
    version = f"MONAI {monai.__version__}"
    cases = [
        ("warp, gradient in the field", our_warp, their_warp, (size, False), (8, False), "Warp"),
        ("warp, gradient in image and field", our_warp, their_warp, (size, True), (8, True), "Warp"),
        ("integrate, 7 steps", our_integrate, their_integrate, (size,), (8,), "DVF2DDF"),
        (f"warp {LABELS} labels", our_labels, their_labels, (size, LABELS), (8, LABELS), "one-hot, Warp, argmax"),
    ]
    return [
        compare(
            what,
            ours,
            theirs,
            args,
            against=f"{version} {name}",
            size=f"{size}^3",
            warm_up=tiny,
            repeats=repeats,
            num_threads=count,
        )
        for what, ours, theirs, args, tiny, name in cases
        for count in thread_counts
    ]


def smooth_field(size: int, amplitude: float = 3.0) -> Tensor:
    """A field of waves (1, 3, size, size, size), ``amplitude`` voxels high: smooth, as real ones are.

    Shifted off the voxels, where linear interpolation has two derivatives and rounding would choose between them.
    """
    phase = identity_grid((size,) * 3) * (4 * math.pi / size)
    waves = [torch.sin(phase[1]) * torch.cos(phase[2]), torch.cos(phase[0] + 0.3), torch.sin(phase[0] + phase[1])]
    return amplitude * torch.stack(waves).unsqueeze(0) + 0.37


def _forward_backward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], weight: Tensor
) -> Callable[[], object]:
    """A call that runs ``function`` and the backward pass of its sum weighted by ``weight``."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]

    def call() -> object:
        result = function(*inputs)
        return result.detach(), torch.autograd.grad(result, wanted, weight)

    return call


def _images(size: int, image_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Image, field and the gradient that arrives at the moved image."""
    torch.manual_seed(0)
    image = torch.rand(1, 1, size, size, size, requires_grad=image_gradient)
    return image, smooth_field(size).requires_grad_(), torch.rand(1, 1, size, size, size)


def our_warp(size: int, image_gradient: bool) -> Callable[[], object]:
    """Forward and backward of :func:`common.spatial.warp`."""
    image, ddf, weight = _images(size, image_gradient)
    return _forward_backward(warp, (image, ddf), weight)


def their_warp(size: int, image_gradient: bool) -> Callable[[], object]:
    """Forward and backward of MONAI's Warp."""
    image, ddf, weight = _images(size, image_gradient)
    return _forward_backward(_quiet(monai.networks.blocks.Warp), (image, ddf), weight)


def our_integrate(size: int) -> Callable[[], object]:
    """Forward and backward of :func:`common.spatial.integrate`."""
    velocity = smooth_field(size).requires_grad_()
    return _forward_backward(lambda v: integrate(v, 7, padding="zeros"), (velocity,), torch.rand_like(velocity))


def their_integrate(size: int) -> Callable[[], object]:
    """Forward and backward of MONAI's DVF2DDF."""
    velocity = smooth_field(size).requires_grad_()
    return _forward_backward(_quiet(monai.networks.blocks.DVF2DDF), (velocity,), torch.rand_like(velocity))


def our_labels(size: int, count: int) -> Callable[[], object]:
    """:func:`common.spatial.warp_labels` on blocks of labels."""
    labels, ddf = _label_blocks(size, count), smooth_field(size)
    return lambda: warp_labels(labels, ddf)


def their_labels(size: int, count: int) -> Callable[[], object]:
    """One-hot, MONAI's Warp, argmax, as the published evaluations do."""
    labels, ddf = _label_blocks(size, count), smooth_field(size)
    mover = _quiet(monai.networks.blocks.Warp)

    def call() -> object:
        with torch.no_grad():
            return mover(monai.networks.one_hot(labels, count), ddf).argmax(1, keepdim=True).to(labels.dtype)

    return call


def _label_blocks(size: int, count: int) -> Tensor:
    """Cubes of ``count`` labels, some ten voxels wide, as organs are: (1, 1, size, size, size) uint8."""
    block = (identity_grid((size,) * 3) // 10).long()
    return ((block[0] * 7 + block[1] * 3 + block[2]) % count).to(torch.uint8)[None, None]


def _quiet(layer: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Make a MONAI layer without its notice about compiled extensions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer()


if __name__ == "__main__":
    print(format_table(measure()))
