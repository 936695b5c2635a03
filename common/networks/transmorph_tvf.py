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
"""TransMorph-TVF: an encoder, a decoder and a field that is refined over time steps (Chen et al., 2022, 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.networks.base import (
    Encoder,
    RegistrationNetwork,
    as_tuple,
    average_pool,
    crop_to,
    encode_pair,
    paired_channels,
    split_pair,
    to_image_grid,
)
from common.networks.blocks import ConvUnit, FlowHead, UpStage, upsample_to
from common.networks.recompute import recomputed
from common.spatial import compose, integrate, warp

__all__ = ["PyramidDecoder", "TimeSteps", "TransMorphTVF", "TVFOutput"]


class TVFOutput(NamedTuple):
    """What the time steps yield on the grid of the network.

    Attributes:
        ddf: displacement (B, d, *S).
        velocity: the stationary velocity whose exponential ``ddf`` is, or None where there is no single one.
        features: sum over the steps of the features under the flow heads, (B, step_channels, *S).
        inverse_ddf: displacement of the inverse (B, d, *S), or None where it was not asked for.
    """

    ddf: Tensor
    velocity: Tensor | None
    features: Tensor
    inverse_ddf: Tensor | None = None


class PyramidDecoder(nn.Module):
    """Features of a pair from the coarsest level up to stride 2, or to the encoder's finest stride if that is 1.

    A level that the encoder lacks (strides 2 to ``strides[0] / 2``) gets its skip from the pooled images.

    Args:
        encoder: gives channels, strides and pairing; it is not kept.
        image_channels: channels of cat(moving, fixed).
        norm: of the units on the pooled images, "instance" or "batch".

    Attributes:
        out_channels: channels of what ``forward`` returns.
    """

    def __init__(self, encoder: Encoder, image_channels: int, norm: str) -> None:
        super().__init__()
        dims, channels = encoder.spatial_dims, paired_channels(encoder)
        below = max(0, (encoder.strides[0] // 2).bit_length() - 1)
        image_skips = [max(channels[0] // 2 ** (k + 1), 8) for k in range(below)]
        widths = [*reversed(channels), *image_skips]
        self.up = nn.ModuleList(UpStage(dims, a, b, b) for a, b in pairwise(widths))
        self.image_units = nn.ModuleList(ConvUnit(dims, image_channels, c, norm=norm) for c in image_skips)
        self.out_channels = widths[-1]

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Pair (B, 2C, *S) and its maps, fine to coarse, to (B, out_channels, *S / 2)."""
        pool = F.avg_pool2d if image.ndim == 4 else F.avg_pool3d
        pooled: list[Tensor] = []
        for unit in reversed(self.image_units):
            image = pool(image, 3, 2, 1)
            pooled.insert(0, unit(image))
        coarse, *finer = reversed(features)
        for stage, skip in zip(self.up, [*finer, *pooled], strict=True):
            coarse = stage(coarse, skip)
        return coarse


class _Step(nn.Module):
    """One time step: features of (moved, fixed) and of the decoder to a field."""

    def __init__(self, dims: int, image_channels: int, context: int, channels: int, norm: str) -> None:
        super().__init__()
        self.pair_unit = ConvUnit(dims, image_channels, context, norm=norm)
        self.up = UpStage(dims, context, context, channels)
        self.head = FlowHead(dims, channels)

    def forward(self, moved: Tensor, fixed: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Field (B, d, *S) and the features under it; ``context`` already lies on the network's grid."""
        features = self.up(context, self.pair_unit(torch.cat((moved, fixed), dim=1)))
        return self.head(features), features


class TimeSteps(nn.Module):
    """Refine a field over ``steps`` time steps, each of which sees the moving image as warped so far.

    ``update`` and ``diffeomorphic`` say how the output v_t of step t changes the transformation:

    - "composition", diffeomorphic: phi_t = phi_(t-1) o exp(v_t), the flow of a velocity that is constant in each step.
    - "composition", not diffeomorphic: phi_t = phi_(t-1) o (id + v_t). In both, v_t is seen on the fixed grid (the
      moved image lies there), so it is the inner transformation.
    - "addition": w_t = w_(t-1) + v_t, a velocity with phi_t = exp(w_t) or, not diffeomorphic, a displacement.
    - "self_warped": w_t = w_(t-1) + v_t o (id + v_t), and if diffeomorphic ddf = exp(w_T), while inside the loop w_t is
      a displacement. TransMorphSPR's published weights were trained with this rule; it mixes the two readings of w.

    Args:
        spatial_dims: 2 or 3.
        image_channels: channels of cat(moving, fixed).
        context_channels: channels of the decoder's output.
        steps: number of time steps.
        step_channels: channels under a flow head.
        update: see above.
        diffeomorphic: see above.
        integration_steps: squarings of each exponential.
        norm: of the units on the images, "instance" or "batch".
        padding: of images and fields outside the grid, "border" or "zeros".
        use_checkpoint: recompute the steps in the backward pass to save memory.

    Raises:
        ValueError: on an unknown update or fewer than one step.
    """

    updates = ("composition", "addition", "self_warped")

    def __init__(
        self,
        spatial_dims: int,
        image_channels: int,
        context_channels: int,
        *,
        steps: int,
        step_channels: int,
        update: str,
        diffeomorphic: bool,
        integration_steps: int,
        norm: str,
        padding: str,
        use_checkpoint: bool,
    ) -> None:
        super().__init__()
        if update not in self.updates:
            raise ValueError(f"update must be one of {self.updates}, got '{update}'")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = nn.ModuleList(
            _Step(spatial_dims, image_channels, context_channels, step_channels, norm) for _ in range(steps)
        )
        self.update, self.diffeomorphic = update, diffeomorphic
        self.integration_steps, self.padding = integration_steps, padding
        self.use_checkpoint = use_checkpoint

    def _exp(self, velocity: Tensor) -> Tensor:
        return integrate(velocity, self.integration_steps, padding=self.padding)

    def _advance(self, total: Tensor | None, step: Tensor) -> Tensor:
        """The accumulated field after a step; there is none before the first."""
        if self.update == "composition":
            inner = self._exp(step) if self.diffeomorphic else step
            return inner if total is None else compose(total, inner, padding=self.padding)
        if self.update == "self_warped":
            step = warp(step, step, padding=self.padding)
        return step if total is None else total + step

    def _retreat(self, inverse: Tensor | None, step: Tensor) -> Tensor:
        """The inverse of composed flows after a step: the last flow, which went first, is undone last."""
        outer = self._exp(-step)
        return outer if inverse is None else compose(outer, inverse, padding=self.padding)

    def _displacement(self, total: Tensor) -> Tensor:
        """The displacement that the accumulated field stands for inside the loop."""
        return self._exp(total) if self.diffeomorphic and self.update == "addition" else total

    def _run(self, step: nn.Module, *args: Tensor) -> tuple[Tensor, Tensor]:
        recompute = self.use_checkpoint and torch.is_grad_enabled()
        out: tuple[Tensor, Tensor] = recomputed(step, *args) if recompute else step(*args)
        return out

    def forward(self, moving: Tensor, fixed: Tensor, context: Tensor, inverse: bool = False) -> TVFOutput:
        """Images (B, C, *S) and decoder features (B, context_channels, *s) to fields on S.

        Args:
            moving: moving image.
            fixed: fixed image.
            context: decoder features.
            inverse: give the inverse too, from velocities run backwards.

        Raises:
            ValueError: when the inverse is asked for and the steps are not diffeomorphic.
        """
        if inverse and not self.diffeomorphic:
            raise ValueError("inverse needs diffeomorphic=True: only velocities can be run backwards")
        context = upsample_to(context, fixed.shape[2:])
        moved, total, features, ddf, undone = moving, None, None, None, None
        for t, step in enumerate(self.steps):
            field, under = self._run(step, moved, fixed, context)
            total = self._advance(total, field)
            if inverse and self.update == "composition":
                undone = self._retreat(undone, field)
            features = under if features is None else features + under
            ddf = self._displacement(total)
            if t + 1 < len(self.steps):
                moved = warp(moving, ddf, padding=self.padding)
        assert total is not None and features is not None and ddf is not None
        velocity = total if self.diffeomorphic and self.update != "composition" else None
        if self.diffeomorphic and self.update == "self_warped":
            ddf = self._exp(total)
        if inverse and velocity is not None:
            undone = self._exp(-velocity)
        return TVFOutput(ddf, velocity, features, undone)


class TransMorphTVF(RegistrationNetwork):
    """TransMorph with a time-varying decoder over any encoder.

    With the base Swin encoder and twelve steps this is the network that the pretraining paper fine-tunes (arXiv
    2505.24167): decoder 384-192-96-48, sixteen channels a step. Differences by default: instead of batch normalisation
    at batch size one there is instance normalisation, and an accumulated displacement is not exponentiated a second
    time (see ``TimeSteps``).

    ``fields`` gives "ddf", "features" (the sum of the step features, on the network's grid, which a further head may
    read), "velocity" where the transformation is the exponential of one velocity and, if ``inverse``, "inverse_ddf".
    Everything but "features" is on the image grid, in image voxels.

    The inverse runs the velocities backwards: it is exp(-w) where the transformation is exp(w), and exp(-v_T) o ... o
    exp(-v_1) for "composition".

    Args:
        encoder: any encoder; a joint one must take ``2 * channels`` channels.
        channels: channels of one image.
        steps: number of time steps.
        step_channels: channels under a flow head.
        update: "composition", "addition" or "self_warped", see ``TimeSteps``.
        diffeomorphic: exponentiate velocities.
        integration_steps: squarings of an exponential.
        downsample: average pooling before the network, one factor or one an axis; 2 is the published half resolution, 1
            runs at full resolution.
        norm: of the units that see the images, "instance" or "batch".
        padding: outside the grid, "border" or "zeros".
        inverse: have ``fields`` give the inverse field too; needs ``diffeomorphic``. May be changed later.
        use_checkpoint: recompute the time steps in the backward pass; batch norms then update their statistics twice.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        channels: int = 1,
        steps: int = 12,
        step_channels: int = 16,
        update: str = "composition",
        diffeomorphic: bool = True,
        integration_steps: int = 7,
        downsample: int | Sequence[int] = 2,
        norm: str = "instance",
        padding: str = "border",
        inverse: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(encoder.spatial_dims)
        self.inverse = inverse
        self.downsample = as_tuple(downsample, self.spatial_dims, "downsample")
        self.encoder = encoder
        self.decoder = PyramidDecoder(encoder, 2 * channels, norm)
        self.time_steps = TimeSteps(
            self.spatial_dims,
            2 * channels,
            self.decoder.out_channels,
            steps=steps,
            step_channels=step_channels,
            update=update,
            diffeomorphic=diffeomorphic,
            integration_steps=integration_steps,
            norm=norm,
            padding=padding,
            use_checkpoint=use_checkpoint,
        )

    def forward(self, image: Tensor) -> Tensor:
        """The field alone, (B, d, *S), of the pair ``image`` (B, 2C, *S)."""
        out, padded = self._refined(image, inverse=False)
        return crop_to(to_image_grid(out.ddf, padded), image.shape[2:])

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S); see the class."""
        out, padded = self._refined(image, self.inverse)
        result = {"ddf": out.ddf, "velocity": out.velocity, "inverse_ddf": out.inverse_ddf}
        size = image.shape[2:]
        on_image = {k: crop_to(to_image_grid(v, padded), size) for k, v in result.items() if v is not None}
        return {**on_image, "features": out.features}

    def _refined(self, image: Tensor, inverse: bool) -> tuple[TVFOutput, torch.Size]:
        """Fields on the grid of the network, and the size of the padded image."""
        padded = self.padded(image, [f * max(self.encoder.strides) for f in self.downsample])
        pair = average_pool(padded, self.downsample)
        context = self.decoder(pair, encode_pair(self.encoder, pair))
        out: TVFOutput = self.time_steps(*split_pair(pair, self.spatial_dims), context, inverse)
        return out, padded.shape[2:]
