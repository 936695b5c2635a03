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
"""Cost of a TransMorphSPR training step beside that of the network as published, operation for operation.

Run ``python -m benchmarks.spatially_varying`` for a Markdown table. Every figure is taken in a fresh process on one
thread: CPU seconds (the least of some calls) and the peak of resident memory above what the imports take.

The published form is our network's own weights run as the authors' code does: the local correlation by convolution with
a dense box of ones, the decoder's features upsampled again in every time step, the weight head whether or not its map
is asked for, PyTorch's convolutions and norms as they come, fields integrated and images sampled through normalised
grids, all steps' tensors kept. The transformer is ours in both, which favours the published form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import cost_in_fresh_process, format_table
from bundles.spatially_varying_reg.scripts.hyperpriors import BetaHyperprior, SpatiallyWeightedDiffusion
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR
from common.losses import LNCC
from common.networks import ConvUnit, UpStage
from common.spatial import warp

__all__ = ["Case", "PublishedForm", "measure", "published_loss"]


class Case(NamedTuple):
    """What is measured: edge of the cubic image, which the network sees at half of it, and options of the network."""

    size: int
    train: bool
    options: dict[str, Any]


_PUBLISHED: dict[str, Any] = {"norm": "batch", "update": "self_warped", "window_size": 2}
CASES = (Case(64, True, {}), Case(64, False, {}))


class PublishedForm(nn.Module):
    """A ``TransMorphSPR`` (3-D, "self_warped", zeros outside) run as its authors run it; sizes must fit."""

    def __init__(self, network: TransMorphSPR) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 2, *S) to "ddf" and "weight_map"."""
        pair = F.avg_pool3d(image, 2)
        coarse, *finer = reversed(self.network.encoder(pair))
        decoder = self.network.decoder
        skip = _unit(decoder.image_units[0], F.avg_pool3d(pair, 3, 2, 1))
        for stage, features in zip(decoder.up, [*finer, skip], strict=True):
            coarse = _stage(stage, coarse, features)
        velocity, features = self._refine(pair, coarse)
        half = velocity / 2**7
        for _ in range(7):
            half = half + _sample(half, half)
        ddf = 2 * F.interpolate(half.clamp(-100, 100), scale_factor=2, mode="trilinear")
        head = self.network.weight_head
        assert head is not None
        for unit in head.hidden:
            features = _unit(unit, features)
        logits = F.interpolate(_convolved(head.last, features), scale_factor=2, mode="trilinear")
        return {"ddf": ddf, "weight_map": torch.sigmoid(logits).clamp(1e-6, 1)}

    def _refine(self, pair: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        moving, fixed = pair.chunk(2, dim=1)
        moved, fields, features = moving, [torch.zeros_like(moving).repeat(1, 3, 1, 1, 1)], []
        for step in self.network.time_steps.steps:
            features.append(_stage(step.up, context, _unit(step.pair_unit, torch.cat((moved, fixed), dim=1))))
            field = _convolved(step.head.conv, features[-1])
            fields.append(fields[-1] + _sample(field, field))
            moved = _sample(moving, fields[-1])
        return fields[-1], torch.stack(features).sum(0)


def _convolved(conv: Any, x: Tensor) -> Tensor:
    return F.conv3d(x, conv.weight, conv.bias, padding=1)


def _unit(unit: Any, x: Tensor) -> Tensor:
    assert isinstance(unit, ConvUnit)
    x = _convolved(unit.conv, x)
    x = unit.norm(x) if isinstance(unit.norm, nn.BatchNorm3d) else F.instance_norm(x)
    return F.leaky_relu(x, 0.01)


def _stage(stage: Any, coarse: Tensor, skip: Tensor) -> Tensor:
    assert isinstance(stage, UpStage)
    coarse = F.interpolate(coarse, scale_factor=2, mode="trilinear")
    return _unit(stage.conv2, _unit(stage.conv1, torch.cat((coarse, skip), dim=1)))


def _sample(image: Tensor, ddf: Tensor) -> Tensor:
    size = ddf.shape[2:]
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=ddf.dtype) for n in size), indexing="ij"))
    scale = torch.tensor([2 / (n - 1) for n in size], dtype=ddf.dtype).view(1, -1, 1, 1, 1)
    places = ((grid + ddf) * scale - 1).flip(1).movedim(1, -1)
    return F.grid_sample(image, places, align_corners=True)


def published_loss(fields: dict[str, Tensor], image: Tensor) -> Tensor:
    """Dense-window local correlation, Beta hyperprior and one-sided weighted diffusion, as published."""
    ddf, weights = fields["ddf"], fields["weight_map"]
    moving, fixed = image.chunk(2, dim=1)
    moved = _sample(moving, ddf)
    box = torch.ones(1, 1, 9, 9, 9, dtype=image.dtype)
    sums = [F.conv3d(x, box, padding=4) for x in (moved, fixed, moved * moved, fixed * fixed, moved * fixed)]
    a, b, aa, bb, ab = sums
    cross = ab - a * b / 729
    similarity = (cross * cross / ((aa - a * a / 729) * (bb - b * b / 729) + 1e-5)).mean()
    prior = -0.175 * weights.clamp(1e-6, 1).log().mean()
    rough = torch.zeros(())
    for axis in (2, 3, 4):
        upper = weights.narrow(axis, 1, weights.shape[axis] - 1)
        rough = rough + (ddf.diff(dim=axis).square() * upper).mean() / 3
    return prior - similarity + 3.35 * rough


def _our_loss() -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    similarity = LNCC(form="sum")
    prior, smoothness = BetaHyperprior(1.175), SpatiallyWeightedDiffusion(3.35)

    def loss(fields: dict[str, Tensor], image: Tensor) -> Tensor:
        moved = warp(image[:, :1], fields["ddf"], padding="zeros")
        total: Tensor = similarity(moved, image[:, 1:]) + prior(fields["weight_map"])
        return total + smoothness(fields["ddf"], fields["weight_map"])

    return loss


def _published(options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return PublishedForm(TransMorphSPR(**_PUBLISHED, **options)), published_loss


def _published_network(options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return _published(options)[0], _our_loss()


def _same(options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return TransMorphSPR(**_PUBLISHED, **options), _our_loss()


def _default(options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Tensor]]:
    return TransMorphSPR(**options), _our_loss()


#: The forms of the network by name, and their losses.
FORMS = {
    "published": _published,
    "published network, our losses": _published_network,
    "ours, published settings": _same,
    "ours, default settings": _default,
}


def measure(cases: tuple[Case, ...] = CASES, repeats: int = 2) -> list[dict[str, Any]]:
    """Measure all forms on all cases.

    Args:
        cases: what to measure.
        repeats: timed calls, after one that the memory is read from.

    Returns:
        rows of what was measured, CPU seconds and MB, and both over the published form's.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        first: tuple[float, float] | None = None
        for form in FORMS:
            if form == "published network, our losses" and not case.train:
                continue
            seconds, megabytes = cost_in_fresh_process(_build, (form, case), repeats)
            first = first or (seconds, megabytes)
            rows.append(
                {
                    "what": f"{'training step' if case.train else 'field alone'}, {form}",
                    "size": f"{case.size}^3",
                    "cpu_s": seconds,
                    "mb": megabytes,
                    "cpu_over_published": seconds / first[0],
                    "mb_over_published": megabytes / first[1] if first[1] else float("nan"),
                }
            )
    return rows


def _build(form: str, case: Case) -> Callable[[], None]:
    network, loss = FORMS[form](case.options)
    network.train(case.train)
    image = torch.rand(1, 2, case.size, case.size, case.size)
    return partial(_train_step, network, loss, image) if case.train else partial(_inference, network, image)


def _train_step(network: nn.Module, loss: Callable[..., Tensor], image: Tensor) -> None:
    """Loss and gradients."""
    network.zero_grad()
    fields = network.fields(image) if isinstance(network, TransMorphSPR) else network(image)
    loss(fields, image).backward()


def _inference(network: nn.Module, image: Tensor) -> None:
    """The field alone."""
    with torch.no_grad():
        network(image)


if __name__ == "__main__":
    print(format_table(measure()))
