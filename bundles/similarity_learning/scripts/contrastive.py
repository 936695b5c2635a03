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
"""How the network of a similarity learns: what is observed must cost less than what the model makes up.

An energy D(F, M) of a fixed image given the moved one is a model p(F | M) = exp(-D(F, M)) / Z(M). Its likelihood has
the gradient of -log p = D + log Z, and that of log Z is minus the mean of D's gradient over the model's own images. A
Gaussian q_f over images stands in for these:

    gradient of -log p(F | M)  ~  gradient of [ D(F, M) - E_q[D(F', M)] ].

"published" (Grzech et al., CVPR 2022): q_f is centred on F, and network and q_f both descend on this difference, so q_f
moves to where D is large; nothing but the limits of its parameters holds it.

"bound": for any q, log Z >= E_q[-D] + H(q), with equality if q is the model. So

    B = D(F, M) - E_q[D(F', M)] + H(q)  <=  -log p(F | M) + constant,

where the network descends and q_f ascends: it moves to where D is small, and its entropy H keeps it wide. Here q_f is
centred on the moved image. Around F the difference says nothing in the simplest case: for a linear network A,
E|A(F + d - M)|² - |A(F - M)|² = E|A d|², in which there is no M. Around M it is |A(F - M)|² - E|A d|²: what is found in
real pairs against what the model would have. Samples are not clipped for this, or q would be no Gaussian.

The network's gradient is right where q_f is near its best. For a new network and "ssd" that is a variance of 1 and no
factors (``ImageGaussian(fixed, sigma=1.0, factor=0.01)``), and q_f needs a learning rate some hundred times the
network's to follow it, as published. A q_f that starts much narrower costs less than any real pair does; then the
network descends by making all energies 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.losses.checks import check_choice

from .image_posterior import ImageGaussian
from .similarity import Similarity

__all__ = ["OBJECTIVES", "ContrastiveObjective", "set_trainable"]

OBJECTIVES = ("published", "bound", "profile")


class ContrastiveObjective:
    """The loss of the network and of q_f, of which one backward pass serves both.

    Args:
        kind: "published", "bound", or, for squared differences, "profile".
    """

    def __init__(self, kind: str = "published") -> None:
        self.kind = check_choice("ContrastiveObjective", "kind", kind, OBJECTIVES)

    def __call__(
        self,
        similarity: Similarity,
        image_posterior: ImageGaussian,
        moved: Sequence[Tensor],
        mask: Tensor | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Energies of the fixed image and of two samples of q_f that are mirrored.

        Args:
            similarity: with parameters that require gradients.
            image_posterior: q_f.
            moved: three warps of the same images by the same fields with noise of their own, (B, 1, *S) each.
            mask: (1, 1, *S) bool, voxels of the fixed image that count.
            draws: noise and coefficients of q_f; drawn if not given.

        Returns:
            scalars, means over the batch: "model" (the energy of the fixed image), "plus" and "minus" (of the samples),
            "entropy" (of q_f, without its constant), and "loss", the only one with gradients: for "published"
            ``model - (plus + minus) / 2``, for "bound" that plus the entropy, for "profile" the bound of samples whose
            distance from the centre is scaled. The gradients of the last two in q_f have their sign reversed, so that
            an optimizer that descends makes the bound tight.

        Raises:
            ValueError: for "profile" with another energy than squared differences.
        """
        if self.kind == "profile" and similarity.kind != "ssd":
            raise ValueError("ContrastiveObjective: kind 'profile' is for similarity 'ssd', whose energy is quadratic")
        draws = image_posterior.draw() if draws is None else draws
        entropy = image_posterior.half_log_determinant().sum()
        if self.kind != "published":
            deviation = _Reversed.apply(image_posterior.deviation(*draws))
            plus, minus, entropy = moved[1] + deviation, moved[2] - deviation, _Reversed.apply(entropy)
        else:
            plus, minus = image_posterior.pair(*draws)
        terms = [
            similarity.energy(similarity.reference(image, mask), warped).mean()
            for image, warped in zip((image_posterior.mean, plus, minus), moved, strict=True)
        ]
        sampled = 0.5 * (terms[1] + terms[2])
        if self.kind == "profile":
            voxels = float(image_posterior.mean.numel() if mask is None else mask.sum())
            width = voxels / (2.0 * sampled.detach())
            sampled, entropy = width * sampled, entropy + 0.5 * voxels * torch.log(width)
        loss = terms[0] - sampled + (0.0 if self.kind == "published" else entropy)
        parts = dict(zip(("model", "plus", "minus"), terms, strict=True), entropy=entropy)
        return {name: part.detach() for name, part in parts.items()} | {"loss": loss}


def set_trainable(module: nn.Module, flag: bool) -> None:
    """Let all parameters of a module require gradients, or none."""
    for parameter in module.parameters():
        parameter.requires_grad_(flag)


class _Reversed(torch.autograd.Function):
    """The same numbers; gradients change their sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]
