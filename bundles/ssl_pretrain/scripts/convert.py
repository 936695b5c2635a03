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
Nothing but tensors and numbers is ever unpickled. This file needs torch and numpy only.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["convert", "infer_window", "read_checkpoint", "to_published", "to_warpzoo"]

Part = Literal["ssl", "encoder"]
logger = logging.getLogger(__name__)

_TABLE = "relative_position_bias_table"
_BUFFER = re.compile(r"(^|\.)(grid|relative_position_index|attn_mask)$")
_ENCODER_PREFIXES = ("encoder.", "transformer.")
# (h, w, d) offsets of the eight sub-grids in the order in which the authors' patch merging concatenates them; ours
# (MONAI's PatchMergingV2) counts in binary.
_MERGE_ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))
_TO_BINARY = sorted(range(8), key=lambda k: _MERGE_ORDER[k])
_FROM_BINARY = [_TO_BINARY.index(k) for k in range(8)]

# Published name, our name. {n} stands for a number that both have, {level} for one that counts the other way round.
_ENCODER_NAMES = (
    ("patch_embed.{rest}", "patch_embed.{rest}"),
    ("layers.{n}.blocks.{m}.mlp.fc{k}.{rest}", "stages.{n}.blocks.{m}.mlp.linear{k}.{rest}"),
    ("layers.{n}.blocks.{m}.{rest}", "stages.{n}.blocks.{m}.{rest}"),
    ("layers.{n}.downsample.{rest}", "merges.{n}.{rest}"),
    ("norm{n}.{rest}", "norms.{n}.{rest}"),
)
_HEAD_NAMES = (
    ("decoder_blocks.{level}.block.0.{rest}", "head.blocks.{level}.conv1.{rest}"),
    ("decoder_blocks.{level}.block.4.{rest}", "head.blocks.{level}.conv2.{rest}"),
    ("flow_heads.{level}.flow_mean.{rest}", "head.heads.{level}.mean.conv.{rest}"),
    ("flow_heads.{level}.flow_sigma.{rest}", "head.heads.{level}.logvar.conv.{rest}"),
    ("flow_block_final.flow_mean.{rest}", "head.ensemble.mean.conv.{rest}"),
    ("flow_block_final.flow_sigma.{rest}", "head.ensemble.logvar.conv.{rest}"),
)


def _match(pattern: str, name: str) -> dict[str, str] | None:
    expression = re.escape(pattern).replace(r"\{rest\}", r"(?P<rest>.+)")
    expression = re.sub(r"\\\{(n|m|k|level)\\\}", r"(?P<\1>\\d+)", expression)
    found = re.fullmatch(expression, name)
    return found.groupdict() if found else None


def _rename(name: str, table: Sequence[tuple[str, str]], levels: int) -> str | None:
    """The new name by the first row of (old pattern, new pattern) that fits, or None."""
    for old, new in table:
        numbers = _match(old, name)
        if numbers is not None:
            if "level" in numbers:
                numbers["level"] = str(levels - 1 - int(numbers["level"]))
            return new.format(**numbers)
    return None


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, bare or under "state_dict".

    Numpy scalars are allowed beside tensors (the authors store the best Dice as one); everything else that would run
    code is refused.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is no torch checkpoint, holds other Python objects, or has no state dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype]
    allowed += [type(np.dtype(kind)) for kind in ("float32", "float64", "int64")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} was not read: it is no torch checkpoint of tensors and numbers, and nothing else is unpickled "
            f"({str(error).splitlines()[0]})"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds neither a state dict nor one under 'state_dict'")
    return dict(state)


def infer_window(state: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The attention window of a published state dict.

    A bias table has (2a-1)(2b-1)(2c-1) rows, which does not tell a, b and c. The sampling grid in the checkpoint has
    the network's input size, of which the recipes take 1/32 (pretraining) or 1/16; without a grid the window is cubic.

    Raises:
        ValueError: when neither fits; pass the window then.
    """
    rows = next((v.shape[0] for k, v in state.items() if k.endswith(_TABLE)), None)
    if rows is None:
        raise ValueError(f"no {_TABLE} in the checkpoint: it is not a Swin transformer's")
    sizes = [tuple(v.shape[2:]) for k, v in state.items() if k.split(".")[-1] == "grid" and v.ndim == 5]
    candidates = [tuple(n // divisor for n in size) for size in sizes for divisor in (32, 16)]
    candidates.append(((round(rows ** (1 / 3)) + 1) // 2,) * 3)
    for a, b, c in candidates:
        if (2 * a - 1) * (2 * b - 1) * (2 * c - 1) == rows:
            return a, b, c
    raise ValueError(f"bias tables of {rows} rows do not tell the window: give it as --window a,b,c")


def _reorder(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Permute the eight channel groups in the last axis."""
    return tensor.unflatten(-1, (8, -1))[..., list(order), :].flatten(-2)


def _is_merge(name: str) -> bool:
    return name.startswith("merges.")


def _encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _ENCODER_PREFIXES:
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if part:
            return part
    return dict(state)


def _count_levels(names: Sequence[str], pattern: str) -> int:
    return 1 + max((int(n["level"]) for name in names if (n := _match(pattern, name))), default=-1)


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
    shape = [2 * w - 1 for w in (infer_window(state) if window is None else window)]
    result: dict[str, Tensor] = {}
    encoder = {k: v for k, v in _encoder_of(state).items() if not _BUFFER.search(k)}
    prefix = "encoder." if part == "ssl" else ""
    for name, tensor in encoder.items():
        new = _rename(name, _ENCODER_NAMES, 0)
        if new is None:
            raise ValueError(f"no weight of the published encoder is called '{name}'")
        if new.endswith(_TABLE):
            if tensor.shape[0] != int(np.prod(shape)):
                raise ValueError(f"{name} has {tensor.shape[0]} rows; window {window} needs {int(np.prod(shape))}")
            tensor = tensor.T.unflatten(1, shape)
        result[prefix + new] = (_reorder(tensor, _TO_BINARY) if _is_merge(new) else tensor).contiguous()
    if part == "encoder":
        return result
    rest = {k: v for k, v in state.items() if not k.startswith(_ENCODER_PREFIXES) and not _BUFFER.search(k)}
    levels = _count_levels(list(rest), _HEAD_NAMES[0][0])
    for name, tensor in rest.items():
        new = _rename(name, _HEAD_NAMES, levels)
        if new is None or not levels:
            raise ValueError(f"no weight of the published pretraining head is called '{name}'")
        result[new] = tensor
    return result


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``to_warpzoo``: the state dict of an ``SSLRegistration`` or ``SwinEncoder`` under the published names."""
    reverse_head = [(ours, published) for published, ours in _HEAD_NAMES]
    reverse_encoder = [(ours, published) for published, ours in _ENCODER_NAMES]
    levels = _count_levels(list(state), reverse_head[0][0])
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            new = _rename(name, reverse_head, levels)
        else:
            bare = name.removeprefix("encoder.")
            new = _rename(bare, reverse_encoder, 0)
            if bare.endswith(_TABLE):
                tensor = tensor.flatten(1).T
            elif _is_merge(bare):
                tensor = _reorder(tensor, _FROM_BINARY)
            if new is not None and bare != name:
                new = f"encoder.{new}"
        if new is None:
            raise ValueError(f"'{name}' has no published name")
        result[new] = tensor.contiguous()
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
