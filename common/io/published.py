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
"""Weights as authors save them, and the layout of TransMorph's Swin encoder in theirs."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "infer_window",
    "is_buffer",
    "permute_merge",
    "read_checkpoint",
    "rename",
    "swin_to_published",
    "swin_to_warpzoo",
]

Names = Sequence[tuple[str, str]]  # old pattern, new pattern

_TABLE = "relative_position_bias_table"
_CONTAINERS = ("state_dict", "model_state_dict", "registration_network")
_BUFFER = re.compile(r"(^|\.)(grid|relative_position_index|attn_mask)$")
# (h, w, d) offsets of the eight sub-grids in the order in which the authors' patch merging concatenates them; ours
# (MONAI's PatchMergingV2) counts in binary.
_MERGE_ORDER = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1))
_TO_BINARY = sorted(range(8), key=lambda k: _MERGE_ORDER[k])
_FROM_BINARY = [_TO_BINARY.index(k) for k in range(8)]

_SWIN_NAMES = (  # theirs, ours
    ("patch_embed.{rest}", "patch_embed.{rest}"),
    ("layers.{n}.blocks.{m}.mlp.fc{k}.{rest}", "stages.{n}.blocks.{m}.mlp.linear{k}.{rest}"),
    ("layers.{n}.blocks.{m}.{rest}", "stages.{n}.blocks.{m}.{rest}"),
    ("layers.{n}.downsample.{rest}", "merges.{n}.{rest}"),
    ("norm{n}.{rest}", "norms.{n}.{rest}"),
)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, bare or under one of the keys that authors use.

    Numpy scalars are allowed beside tensors (authors store scores as such); everything else that would run code is
    refused.

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
    if isinstance(content, Mapping):
        state = next((content[key] for key in _CONTAINERS if key in content), content)
        if isinstance(state, Mapping) and state and all(isinstance(v, Tensor) for v in state.values()):
            return dict(state)
    raise ValueError(f"{path} holds neither a state dict nor one under {' or '.join(map(repr, _CONTAINERS))}")


def is_buffer(name: str) -> bool:
    """Whether a published entry is a sampling grid or an index, which tie a checkpoint to an image size."""
    return _BUFFER.search(name) is not None


def rename(name: str, table: Names) -> str | None:
    """The new name by the first row of (old pattern, new pattern) that fits, or None.

    In a pattern {rest} stands for anything, every other word in braces for a number.
    """
    for old, new in table:
        expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(old).replace(r"\{rest\}", "(?P<rest>.+)"))
        found = re.fullmatch(expression, name)
        if found:
            return new.format(**found.groupdict())
    return None


def infer_window(state: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """The attention window of a published state dict.

    A bias table has (2a-1)(2b-1)(2c-1) rows, which does not tell a, b and c. The sampling grid in the checkpoint has
    the network's input size or the image's, of which the recipes take 1/32 or 1/16; without a grid the window is cubic.

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


def permute_merge(tensor: Tensor, *, to_published: bool) -> Tensor:
    """A weight of a patch merging whose last axis holds the eight sub-grids, in the other order."""
    order = _FROM_BINARY if to_published else _TO_BINARY
    return tensor.unflatten(-1, (8, -1))[..., order, :].flatten(-2).contiguous()


def swin_to_warpzoo(state: Mapping[str, Tensor], window: Sequence[int]) -> dict[str, Tensor]:
    """A published Swin encoder as the state dict of ``SwinEncoder``.

    Args:
        state: its weights under the published names, without what stands before them; buffers are dropped.
        window: the attention window.

    Raises:
        ValueError: when a name is not known, or the window does not fit the bias tables.
    """
    result: dict[str, Tensor] = {}
    shape = [2 * w - 1 for w in window]
    for name, tensor in state.items():
        if is_buffer(name):
            continue
        new = rename(name, _SWIN_NAMES)
        if new is None:
            raise ValueError(f"no weight of the published encoder is called '{name}'")
        if new.endswith(_TABLE):
            if tensor.shape[0] != math.prod(shape):
                raise ValueError(f"{name} has {tensor.shape[0]} rows; window {tuple(window)} needs {math.prod(shape)}")
            tensor = tensor.T.unflatten(1, shape)
        elif new.startswith("merges."):
            tensor = permute_merge(tensor, to_published=False)
        result[new] = tensor.contiguous()
    return result


def swin_to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`swin_to_warpzoo`.

    Raises:
        ValueError: when a name is none of ``SwinEncoder``.
    """
    result: dict[str, Tensor] = {}
    reverse = [(ours, theirs) for theirs, ours in _SWIN_NAMES]
    for name, tensor in state.items():
        new = rename(name, reverse)
        if new is None:
            raise ValueError(f"'{name}' has no published name")
        if name.endswith(_TABLE):
            tensor = tensor.flatten(1).T
        elif name.startswith("merges."):
            tensor = permute_merge(tensor, to_published=True)
        result[new] = tensor.contiguous()
    return result
