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
"""State dicts, from one side to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from common.io.published import permute_merge

from .names import NETWORKS, OURS, TABLE, THEIRS
from .renaming import rename, without_prefix

__all__ = ["check_network", "to_published", "to_warpzoo"]


def _window(rows: int, window: Sequence[int] | None) -> tuple[int, ...]:
    """The attention window that has a bias table of so many rows: the given one, the published one, or a cube."""
    cube = (round(rows ** (1 / 3)) + 1) // 2
    for candidate in [tuple(window)] if window is not None else [(5, 6, 7), (cube,) * 3]:
        if int(np.prod([2 * w - 1 for w in candidate])) == rows:
            return candidate
    raise ValueError(f"a bias table of {rows} rows does not fit window {window}: give it as --window a,b,c")


def _transmorph_layout(state: dict[str, Tensor], window: Sequence[int] | None) -> dict[str, Tensor]:
    """TransMorph's weights under our names, as our layers want them."""
    result = {}
    for name, tensor in state.items():
        if name.endswith(TABLE):
            shape = [2 * w - 1 for w in _window(tensor.shape[0], window)]
            tensor = tensor.T.unflatten(1, shape).contiguous()
        elif name.startswith("encoder.merges."):
            tensor = permute_merge(tensor, to_published=False)
        elif name.startswith("head."):
            tensor = tensor / 2
        result[name] = tensor
    return result


def _published_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo ``_transmorph_layout``, under the published names."""
    result = {}
    for name, tensor in state.items():
        if name.endswith(TABLE):
            tensor = tensor.flatten(1).T.contiguous()
        elif ".downsample." in name:
            tensor = permute_merge(tensor, to_published=True)
        elif name.startswith("reg_head."):
            tensor = tensor * 2
        result[name] = tensor
    return result


def check_network(network: str) -> None:
    """Raise a ``ValueError`` that lists the networks, when there is none of this name."""
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {sorted(NETWORKS)}, got {network!r}")


def to_warpzoo(state: Mapping[str, Tensor], network: str, window: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Published weights under our names and in our layout.

    Args:
        state: a published state dict.
        network: one of ``NETWORKS``.
        window: TransMorph's attention window, where it is neither (5, 6, 7) nor a cube.

    Raises:
        ValueError: when the network is not known, a name is not known, a weight is missing, or a window does not fit.
    """
    check_network(network)
    result = rename(without_prefix(state, network), network, THEIRS)
    return _transmorph_layout(result, window) if network == "transmorph" else result


def to_published(state: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """Undo ``to_warpzoo``: our state dict of a network under the published names.

    Raises:
        ValueError: when the network is not known, a name is not known, or a weight is missing.
    """
    check_network(network)
    result = rename(state, network, OURS)
    return _published_layout(result) if network == "transmorph" else result
