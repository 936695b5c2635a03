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

"""The authors' pretraining checkpoints as ours.

    python bundles/ssl_pretrain/scripts/convert.py SRC.pth.tar DST.pt                   # SSLRegistration
    python bundles/ssl_pretrain/scripts/convert.py SRC.pth.tar DST.pt --part encoder    # SwinEncoder only

``DST.pt`` is a plain state dict. Sampling grids and index buffers are dropped: they tie a checkpoint to an image size.
Nothing but tensors and numbers is ever unpickled. In an unpacked bundle, which has no ``bundles`` folder and ``common``
beside ``scripts``, it is ``python -m scripts.convert``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Literal

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

__all__ = ["convert", "infer_window", "read_checkpoint", "to_published", "to_warpzoo"]

Part = Literal["ssl", "encoder"]
logger = logging.getLogger(__name__)

_TABLE = "relative_position_bias_table"
_ENCODER_PREFIXES = ("encoder.", "transformer.")
# Published name, our name; their levels count from the coarsest, ours from the finest.
_HEAD_NAMES = (
    ("decoder_blocks.{level}.block.0.{rest}", "head.blocks.{level}.conv1.{rest}"),
    ("decoder_blocks.{level}.block.4.{rest}", "head.blocks.{level}.conv2.{rest}"),
    ("flow_heads.{level}.flow_mean.{rest}", "head.heads.{level}.mean.conv.{rest}"),
    ("flow_heads.{level}.flow_sigma.{rest}", "head.heads.{level}.logvar.conv.{rest}"),
    ("flow_block_final.flow_mean.{rest}", "head.ensemble.mean.conv.{rest}"),
    ("flow_block_final.flow_sigma.{rest}", "head.ensemble.logvar.conv.{rest}"),
)
_LEVEL = re.compile(r"(blocks|heads)\.(\d+)")


def _rename_head(state: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, str | None]:
    """New names of the head's weights, the levels counted from the other end."""
    last = max((int(found.group(2)) for name in state if (found := _LEVEL.search(name))), default=0)

    def turned(name: str) -> str:
        return _LEVEL.sub(lambda found: f"{found.group(1)}.{last - int(found.group(2))}", name, count=1)

    return {name: rename(turned(name), table) for name in state}


def _encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _ENCODER_PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if part:
            return part
    return dict(state)


def to_warpzoo(
    state: Mapping[str, Tensor], part: Part = "ssl", window: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Published weights under our names and in our layout.

    Args:
        state: a published state dict: of the pretraining network, or (``part="encoder"``) of any network with the same
            Swin encoder under ``encoder.`` or ``transformer.``, or of the encoder alone.
        part: "ssl" for ``SSLRegistration``, "encoder" for ``SwinEncoder``.
        window: the attention window, when the checkpoint does not tell it.

    Raises:
        ValueError: when a weight has a name that is not known, or the window does not fit the bias tables.
    """
    if part not in ("ssl", "encoder"):
        raise ValueError(f"part must be 'ssl' or 'encoder', got '{part}'")
    encoder = swin_to_warpzoo(_encoder_of(state), infer_window(state) if window is None else window)
    if part == "encoder":
        return encoder
    head = {k: v for k, v in state.items() if not k.startswith(_ENCODER_PREFIXES) and not is_buffer(k)}
    result = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    for name, new in _rename_head(head, _HEAD_NAMES).items():
        if new is None:
            raise ValueError(f"no weight of the published pretraining head is called '{name}'")
        result[new] = head[name]
    return result


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_warpzoo``: the state dict of an ``SSLRegistration`` or ``SwinEncoder`` under the published names."""
    head = {k: v for k, v in state.items() if k.startswith("head.")}
    encoder = {k: v for k, v in state.items() if k not in head}
    prefix = "encoder." if any(k.startswith("encoder.") for k in encoder) else ""
    published = swin_to_published({k.removeprefix(prefix): v for k, v in encoder.items()})
    result = {f"{prefix}{name}": tensor for name, tensor in published.items()}
    for name, new in _rename_head(head, [(ours, theirs) for theirs, ours in _HEAD_NAMES]).items():
        if new is None:
            raise ValueError(f"'{name}' has no published name")
        result[new] = head[name]
    return result


def convert(source: str, destination: str, part: Part = "ssl", window: Sequence[int] | None = None) -> None:
    """Convert a checkpoint file of the authors.

    Args:
        source: their file, such as ``dsc0.753.pth.tar``.
        destination: where our state dict goes.
        part: "ssl" for the whole pretraining network, "encoder" for the encoder alone.
        window: attention window a,b,c, when the checkpoint does not tell it.

    Raises:
        FileNotFoundError, ValueError: see ``read_checkpoint`` and ``to_warpzoo``.
    """
    state = to_warpzoo(read_checkpoint(source), part, window)
    torch.save(state, destination)
    table = next(v for k, v in state.items() if k.endswith(_TABLE))
    logger.info(
        "%s: %d weights, %d numbers, window %s",
        destination,
        len(state),
        sum(v.numel() for v in state.values()),
        tuple((n + 1) // 2 for n in table.shape[1:]),
    )


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(convert)
