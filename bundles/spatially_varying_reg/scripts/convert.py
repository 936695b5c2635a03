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
"""The authors' TransMorphSPR checkpoints as ours.

    python bundles/spatially_varying_reg/scripts/convert.py SRC DST.pt

``DST.pt`` is a plain state dict of ``TransMorphSPR``; what it was built with is logged. Whatever stands before all
names, such as ``module.``, is taken off. Sampling grids and index buffers are dropped: they tie a checkpoint to an
image size. So is ``reg_head``, which no output of theirs depends on. A name that is not known is an error; nothing but
tensors and numbers is ever unpickled. In an unpacked bundle, which has no ``bundles`` folder and ``common`` beside
``scripts``, it is ``python -m scripts.convert``.

The names are those of the authors' source code; no checkpoint of theirs was at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.io.published import (
    infer_window,
    is_buffer,
    read_checkpoint,
    rename,
    swin_to_published,
    swin_to_warpzoo,
)

__all__ = ["arguments_of", "convert", "to_published", "to_warpzoo"]

logger = logging.getLogger(__name__)

_THEIR_ENCODER, _OUR_ENCODER = "transformer.", "encoder."
_UNUSED = "reg_head."
_NAMES = (  # theirs, ours
    ("up{n}.conv{k}.0.{rest}", "decoder.up.{n}.conv{k}.conv.{rest}"),
    ("c1.0.{rest}", "decoder.image_units.0.conv.{rest}"),
    ("c1.1.{rest}", "decoder.image_units.0.norm.{rest}"),
    ("cs.{t}.0.{rest}", "time_steps.steps.{t}.pair_unit.conv.{rest}"),
    ("cs.{t}.1.{rest}", "time_steps.steps.{t}.pair_unit.norm.{rest}"),
    ("up3s.{t}.conv{k}.0.{rest}", "time_steps.steps.{t}.up.conv{k}.conv.{rest}"),
    ("reg_heads.{t}.0.{rest}", "time_steps.steps.{t}.head.conv.{rest}"),
    ("sigma_2.{rest}", "weight_head.last.{rest}"),
    ("sigma_{n}.0.{rest}", "weight_head.hidden.{n}.conv.{rest}"),
    ("sigma_{n}.1.{rest}", "weight_head.hidden.{n}.norm.{rest}"),
)


def _split(state: Mapping[str, Tensor], encoder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's weights, without the prefix ``encoder``, and the others."""
    inside = {name.removeprefix(encoder): tensor for name, tensor in state.items() if name.startswith(encoder)}
    return inside, {name: tensor for name, tensor in state.items() if not name.startswith(encoder)}


def _renamed(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]], whose: str) -> dict[str, Tensor]:
    names = {name: rename(name, table) for name in state}
    unknown = sorted(name for name, new in names.items() if new is None)
    if unknown:
        raise ValueError(f"{len(unknown)} weights have no place in {whose} TransMorphSPR, such as {unknown[:3]}")
    return {new: state[name] for name, new in names.items() if new is not None}


def to_warpzoo(state: Mapping[str, Tensor], window: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Published weights under our names and in our layout.

    Args:
        state: a published state dict.
        window: the attention window, when the sampling grids in it do not tell.

    Raises:
        ValueError: when a name is not known, or the window does not fit the bias tables.
    """
    before = next((name.partition(_THEIR_ENCODER)[0] for name in state if _THEIR_ENCODER in name), "")
    state = {name.removeprefix(before): tensor for name, tensor in state.items()}
    encoder, rest = _split(state, _THEIR_ENCODER)
    encoder = swin_to_warpzoo(encoder, infer_window(state) if window is None else window)
    used = {name: tensor for name, tensor in rest.items() if not (name.startswith(_UNUSED) or is_buffer(name))}
    ours = {f"{_OUR_ENCODER}{name}": tensor for name, tensor in encoder.items()}
    return ours | _renamed(used, _NAMES, "the published")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`to_warpzoo`: the state dict of a ``TransMorphSPR`` under the published names.

    Raises:
        ValueError: when a name is not known.
    """
    encoder, rest = _split(state, _OUR_ENCODER)
    theirs = {f"{_THEIR_ENCODER}{name}": tensor for name, tensor in swin_to_published(encoder).items()}
    return theirs | _renamed(rest, [(ours, published) for published, ours in _NAMES], "our")


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a ``TransMorphSPR`` must be built with to take a state dict of ours, as far as the weights tell.

    The number of heads they tell; ``update``, ``diffeomorphic`` and the like they do not.
    """
    tables = {name: t for name, t in state.items() if name.endswith("relative_position_bias_table")}
    places = [name.split(".") for name in tables]  # encoder.stages.n.blocks.m...
    levels = 1 + max(int(place[2]) for place in places)
    embedding = state["encoder.patch_embed.proj.weight"]
    return {
        "spatial_dims": embedding.ndim - 2,
        "channels": embedding.shape[1] // 2,
        "embed_dim": embedding.shape[0],
        "depths": tuple(sum(int(place[2]) == level for place in places) for level in range(levels)),
        "num_heads": tuple(
            tables[f"encoder.stages.{n}.blocks.0.attn.relative_position_bias_table"].shape[0] for n in range(levels)
        ),
        "window_size": tuple((n + 1) // 2 for n in next(iter(tables.values())).shape[1:]),
        "patch_size": embedding.shape[2],
        "steps": sum(name.endswith(".head.conv.weight") for name in state),
        "step_channels": state["time_steps.steps.0.head.conv.weight"].shape[1],
        "norm": "batch" if "decoder.image_units.0.norm.running_mean" in state else "instance",
        "weight_map": "weight_head.last.weight" in state,
    }


def convert(source: str, destination: str, window: Sequence[int] | None = None) -> None:
    """Convert a checkpoint file of the authors.

    Args:
        source: their file.
        destination: where our state dict goes.
        window: attention window a,b,c, when the checkpoint does not tell it.

    Raises:
        FileNotFoundError, ValueError: see ``read_checkpoint`` and ``to_warpzoo``.
    """
    state = to_warpzoo(read_checkpoint(source), window)
    torch.save(state, destination)
    options = ", ".join(f"{key}={value!r}" for key, value in arguments_of(state).items())
    logger.info("%s: %d numbers, %s", destination, sum(map(Tensor.numel, state.values())), options)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(convert)
