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
"""Convolutions with a leaky ReLU that suit a CPU: channels last, and no volume left to PyTorch's slow path.

oneDNN is up to twice as fast on maps whose channels lie together in memory as on ones it has to put in order itself.
PyTorch does not ask it at all for one volume with few numbers in a plane across the last axis, but unfolds it in a loop
that is several times slower. Such a volume is cut in two along its first axis, which makes a batch of two; with the
channels last the two results lie in memory as the one they are parts of.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.spatial.exporting import exporting

__all__ = ["channels_last", "convolve_leaky"]

_UNFOLDED = 20480  # numbers in B, C and all axes but the last, up to which PyTorch takes the loop


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) with its channels last in memory on a CPU, as it is elsewhere."""
    if x.device.type != "cpu" or exporting():
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def convolve_leaky(conv: nn.Conv2d | nn.Conv3d, x: Tensor, slope: float) -> Tensor:
    """A convolution k3 that keeps the size, then a leaky ReLU (a slope of 1 is none).

    Args:
        conv: holds the weights.
        x: (B, C, *S), as :func:`channels_last` leaves it.
        slope: of the leaky ReLU for negative numbers.

    Returns:
        (B, out, *S).
    """
    if x.ndim == 4:
        return _leaky(F.conv2d(x, conv.weight, conv.bias, padding=1), slope)
    if exporting():
        return _leaky(F.conv3d(x, conv.weight, conv.bias, padding=1), slope)
    alone = len(x) == 1 and x.shape[2] > 1 and x.shape[:-1].numel() <= _UNFOLDED
    if not (alone and x.device.type == "cpu" and x.dtype == torch.float32):
        return _leaky(F.conv3d(x, conv.weight, conv.bias, padding=1), slope)
    length = x.shape[2]
    half = -(-length // 2)
    x = F.pad(x, (0, 0, 0, 0, 1, 1 + 2 * half - length))
    halves = channels_last(torch.cat((x[:, :, : half + 2], x[:, :, half:])))
    y = _leaky(F.conv3d(halves, conv.weight, conv.bias, padding=(0, 1, 1)), slope)
    y = y.permute(0, 2, 3, 4, 1).flatten(0, 1).unsqueeze(0).permute(0, 4, 1, 2, 3)
    return y[:, :, :length]


def _leaky(y: Tensor, slope: float) -> Tensor:
    """In place: a convolution's derivative does not need its result, nor a leaky ReLU's its input."""
    return y if slope == 1.0 else F.leaky_relu_(y, slope)
