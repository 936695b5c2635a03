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
"""GraDIRN's cost: beside the published figures, and beside the same network written plainly, on the same machine.

Run ``python -m benchmarks.gradirn`` for a Markdown table. Every figure is taken in a fresh process on one thread: CPU
seconds (the least of some calls) and the peak of resident memory above what the imports take. The published figures are
those of the authors' code on a machine like ours; CPU seconds vary with what else a machine does, by up to a half, so
the plain network is the one to compare with. It is the published form: the similarity differentiated automatically in
each step, activations not in place, convolutions as PyTorch lays them out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import cost_in_fresh_process, format_table
from bundles.gradirn.scripts.baseline import VoxelMorphBaseline
from bundles.gradirn.scripts.network import GraDIRN
from common.losses import MSE, Diffusion
from common.spatial import warp

__all__ = ["PlainGraDIRN", "measure"]


class Case(NamedTuple):
    """What is measured, and what the authors' code takes for it (CPU seconds, MB; NaN where that is not known)."""

    spatial_dims: int
    size: int
    batch: int
    train: bool
    seconds: float
    megabytes: float
    baseline: bool = False


_UNKNOWN = float("nan")
CASES = (
    Case(2, 128, 1, False, 0.18, 34),
    Case(2, 128, 1, True, 0.25, 141),
    Case(2, 128, 10, True, _UNKNOWN, 1301),
    Case(3, 64, 1, False, 2.96, 337),
    Case(3, 64, 1, True, 9.0, 1456),
    Case(2, 128, 1, True, 0.04, 59, baseline=True),
    Case(3, 64, 1, True, 1.26, 431, baseline=True),
)
#: The forms of the network by name.
FORMS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda dims: PlainGraDIRN(dims),
    "ours": lambda dims: GraDIRN(dims),
    "ours, steps checkpointed": lambda dims: GraDIRN(dims, checkpointing=True),
    "ours, gradient steps alone": lambda dims: GraDIRN(dims, use_regulariser=False),
    "baseline": lambda dims: VoxelMorphBaseline(dims),
}


class PlainGraDIRN(nn.Module):
    """GraDIRN with squared differences, three levels and steps, as one would first write it; sizes divide by four."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.regularisers = nn.ModuleList(self._regulariser() for _ in range(3))
        self.taus = nn.ParameterList(torch.tensor(0.05) for _ in range(3))

    def _regulariser(self) -> nn.Module:
        kind = nn.Conv2d if self.spatial_dims == 2 else nn.Conv3d
        layers: list[nn.Module] = []
        for a, b in pairwise([self.spatial_dims + 2, 32, 32, 32, 32]):
            layers += [kind(a, b, 3, padding=1), nn.LeakyReLU(0.2)]
        last = kind(32, self.spatial_dims, 3, padding=1)
        nn.init.zeros_(last.weight)
        return nn.Sequential(*layers, last)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 2, *S) to the field (B, d, *S)."""
        ddf: Tensor | None = None
        for level, (regulariser, tau) in enumerate(zip(self.regularisers, self.taus, strict=True)):
            size = [n // 2 ** (2 - level) for n in image.shape[2:]]
            moving, fixed = F.interpolate(image, size=size, mode=self.mode, align_corners=True).chunk(2, dim=1)
            if ddf is None:
                ddf = image.new_zeros((len(image), self.spatial_dims, *size))
            else:
                ddf = 2 * F.interpolate(ddf, size=size, mode=self.mode, align_corners=True)
            grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in size), indexing="ij"))
            for _ in range(3):
                gradient, moved = self._gradient(ddf, moving, fixed, grid)
                ddf = ddf - 10 * tau * gradient - regulariser(torch.cat((ddf, fixed, moved), dim=1))
        assert ddf is not None
        return ddf

    def _gradient(self, ddf: Tensor, moving: Tensor, fixed: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            ddf = ddf if ddf.requires_grad else ddf.detach().requires_grad_()
            scale = torch.tensor([2 / (n - 1) for n in ddf.shape[2:]]).view(1, -1, *(1,) * self.spatial_dims)
            places = (grid + ddf * scale).flip(1).movedim(1, -1)
            moved = F.grid_sample(moving, places, padding_mode="border", align_corners=True)
            energy = (moved - fixed).square().sum()
            return torch.autograd.grad(energy, ddf, create_graph=self.training)[0], moved


def measure(cases: tuple[Case, ...] = CASES, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure all forms on all cases.

    Args:
        cases: what to measure.
        repeats: timed calls, after one that the memory is read from.

    Returns:
        rows of what was measured, CPU seconds and MB, and both over the published figures and over the plain form's.
    """
    rows = []
    for case in cases:
        plain: tuple[float, float] | None = None
        for form in FORMS:
            if case.baseline != (form == "baseline") or (form == "ours, steps checkpointed" and not case.train):
                continue
            seconds, megabytes = cost_in_fresh_process(_build, (form, case), repeats)
            plain = (seconds, megabytes) if form == "plain" else plain
            rows.append(
                {
                    "what": f"{'training step' if case.train else 'inference'}, {form}",
                    "size": f"{case.size}^{case.spatial_dims} x {case.batch}",
                    "cpu_s": seconds,
                    "mb": megabytes,
                    "cpu_over_published": seconds / case.seconds,
                    "mb_over_published": megabytes / case.megabytes,
                    "cpu_over_plain": seconds / plain[0] if plain else _UNKNOWN,
                    "mb_over_plain": megabytes / plain[1] if plain and plain[1] else _UNKNOWN,
                }
            )
    return rows


def _build(form: str, case: Case) -> Callable[[], None]:
    network = FORMS[form](case.spatial_dims).train(case.train)
    image = torch.rand(case.batch, 2, *(case.size,) * case.spatial_dims)
    return partial(_train_step if case.train else _inference, network, image)


def _train_step(network: nn.Module, image: Tensor) -> None:
    """Loss and gradients."""
    network.zero_grad()
    ddf = network(image)
    (MSE()(warp(image[:, :1], ddf), image[:, 1:]) + 0.01 * Diffusion()(ddf)).backward()


def _inference(network: nn.Module, image: Tensor) -> None:
    """The field; where nothing is differentiated, in the mode that could not."""
    with torch.no_grad() if isinstance(network, PlainGraDIRN) else torch.inference_mode():
        network(image)


if __name__ == "__main__":
    print(format_table(measure()))
