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
"""How the authors' networks name their weights, and how ours do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["NETWORKS", "OURS", "TABLE", "THEIRS", "Network", "Part", "join"]

TABLE = "relative_position_bias_table"
THEIRS, OURS = 0, 1
Names = tuple[str, str]  # theirs, ours


class Part(NamedTuple):
    """Modules that occur as a whole.

    Numbers in the names: {n} and {m} are the same in both, but {finer} is never the last one in ours; {next} is one
    more in ours; {level} counts from the coarsest level in theirs and from the finest in ours; {coarsest} is that of
    the coarsest level.

    Attributes:
        module: the name of the modules.
        weights: the names of their weights, after that of the module.
        more: how many modules more there are than levels; None where their number is free.
    """

    module: Names
    weights: tuple[Names, ...]
    more: int | None = None


class Network(NamedTuple):
    """How a published network names its weights.

    Attributes:
        anchor: a name that every checkpoint has; what stands before it stands before all names.
        parts: what every checkpoint has.
        one_of: parts of which a checkpoint has one.
        unused: a name that is dropped.
    """

    anchor: str
    parts: tuple[Part, ...]
    one_of: tuple[Part, ...] = ()
    unused: str = ""


def join(*names: str) -> str:
    """Names as one, without the empty ones."""
    return ".".join(name for name in names if name)


def _both(*layers: str | Names) -> tuple[Names, ...]:
    """Weight and bias of layers, given by their common name or by theirs and ours."""
    pairs = [(one, one) if isinstance(one, str) else one for one in layers]
    return tuple((join(a, kind), join(b, kind)) for a, b in pairs for kind in ("weight", "bias"))


def _within(theirs: str, ours: str, weights: Sequence[Names]) -> tuple[Names, ...]:
    return tuple((join(theirs, a), join(ours, b)) for a, b in weights)


_RESIDUAL = _both(
    ("main_branch.0.0", "conv1"),
    ("main_branch.0.1", "norm1"),
    ("main_branch.1.0", "conv2"),
    ("main_branch.1.1", "norm2"),
    ("skip_conv", "skip"),
    "skip_norm",
)
_HEAD = _within("res_block", "block", _RESIDUAL) + _both(("out_block.0", "flow.conv"))
_DOUBLE = _both(("conv1", "0.conv"), ("norm1", "0.norm"), ("conv2", "1.conv"), ("norm2", "1.norm"))
_UNITS = tuple(
    pair
    for j in "01"
    for pair in _both((f"convolutions.{j}.conv", f"units.{j}.conv"), (f"normalizers.{j}", f"units.{j}.norm"))
)
_SWIN_BLOCK = (
    *_both("norm1", "norm2", "attn.proj", ("mlp.fc1", "mlp.linear1"), ("mlp.fc2", "mlp.linear2")),
    ("attn.qkv.weight", "attn.qkv.weight"),
    (f"attn.{TABLE}", f"attn.{TABLE}"),
)

#: The published networks, by name.
NETWORKS: dict[str, Network] = {
    "dual_stream": Network(
        anchor="feature_encoder.encoder.projection.weight",
        parts=(
            Part(("feature_encoder.encoder", "encoder"), _both("projection")),
            Part(("feature_encoder.encoder.block0", "encoder.blocks.0"), _RESIDUAL),
            Part(("feature_encoder.encoder.blocks.{next}", "encoder.blocks.{next}"), _RESIDUAL, -1),
        ),
        one_of=(
            Part(("deformation_decoder.decoder.dp_blocks.{level}", "decoder.steps.{level}.head"), _HEAD, 0),
            Part(("deformation_decoder._not_none_dense_extration_networks.{n}", "decoder.heads.{n}"), _HEAD, 0),
            Part(
                ("deformation_decoder.decoder.dp_blocks.{level}", "decoder.steps.{level}"),
                _both(("proj", "projection")),
                0,
            ),
        ),
    ),
    "vfa": Network(
        anchor="encoder.in_norm.weight",
        parts=(
            Part(("encoder", "encoder"), _both(("in_norm", "normalize"), ("in_conv", "stem"))),
            Part(("encoder.encoder_conv.{finer}", "encoder.down.{finer}"), _DOUBLE, -1),
            Part(("encoder.bottleneck_conv", "encoder.down.{coarsest}"), _DOUBLE),
            Part(("encoder.upsampling.{n}", "encoder.rise.{n}"), _both("conv", "norm"), -1),
            Part(("encoder.decoder_conv.{n}", "encoder.up.{n}"), _DOUBLE, -1),
            Part(("decoder.project.{n}", "steps.{n}"), _both(("", "projection")), 0),
            Part(("decoder", ""), (("beta", "beta"),)),
        ),
    ),
    "sitreg": Network(
        anchor="_feature_extractor.initial_projection.weight",
        parts=(
            Part(("_feature_extractor", "encoder"), _both(("initial_projection", "projection"))),
            Part(("_feature_extractor.initial_convs", "encoder"), _UNITS),
            Part(
                ("_feature_extractor.downsampling_blocks.{n}", "encoder.stages.{n}"),
                _both(("downsampling.conv", "down"), ("projection.conv", "projection")) + _within("conv", "", _UNITS),
                -1,
            ),
            Part(
                ("_not_none_dense_extration_networks.{n}", "decoder.heads.{n}"),
                _within("convolutions", "", _UNITS) + _both(("final_convolution.conv", "flow")),
                0,
            ),
        ),
    ),
    "transmorph": Network(
        anchor="transformer.patch_embed.proj.weight",
        parts=(
            Part(("transformer.patch_embed", "encoder.patch_embed"), _both("proj", "norm")),
            Part(("transformer.layers.{n}.blocks.{m}", "encoder.stages.{n}.blocks.{m}"), _SWIN_BLOCK, 0),
            Part(
                ("transformer.layers.{n}.downsample", "encoder.merges.{n}"),
                (*_both("norm"), ("reduction.weight", "reduction.weight")),
                -1,
            ),
            Part(("transformer.norm{n}", "encoder.norms.{n}"), _both(""), 0),
            Part(("up{n}", "up.{n}"), tuple((f"conv{j}.0.weight", f"conv{j}.conv.weight") for j in "12"), 0),
            Part(("c1", "image_unit"), (("0.weight", "conv.weight"),)),
            Part(("reg_head", "head"), _both(("0", "conv"))),
        ),
        unused="c2.0.weight",
    ),
    "voxelmorph": Network(
        anchor="unet_model.downarm.0.main.weight",
        parts=(
            Part(("unet_model.downarm.{n}", "unet.encoder.convs.{n}"), _both(("main", "")), 0),
            Part(("unet_model.uparm.{n}", "unet.decoder.{n}"), _both(("main", "")), 0),
            Part(("unet_model.extras.{n}", "unet.full.{n}"), _both(("main", ""))),
            Part(("flow", "head.conv"), _both("")),
        ),
    ),
}
