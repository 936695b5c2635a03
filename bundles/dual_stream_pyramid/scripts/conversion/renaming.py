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
"""Names of weights, from one side to the other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor

from .names import NETWORKS, OURS, THEIRS, Part, join

__all__ = ["rename", "without_prefix"]

_BUFFER = re.compile(r"(^|\.)(grid|relative_position_index|attn_mask)$|_coordinate_system")


Numbers = tuple[int, ...]


def _found(part: Part, names: Collection[str], side: int) -> set[Numbers]:
    """The numbers of a part's modules of which at least one weight is there, as theirs ({level}: as they stand)."""
    weights = "|".join(re.escape(weight[side]) for weight in part.weights)
    module = re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(part.module[side]))
    expression = re.compile(f"{module}\\.(?:{weights})" if module else weights)
    found = {tuple(map(int, match.groups())) for name in names if (match := expression.fullmatch(name))}
    if side == OURS and "{next}" in part.module[side]:
        return {(n - 1,) for (n,) in found if n}
    if side == OURS and "{finer}" in part.module[side]:
        return found - {max(found, default=())}
    return found


def _without_gaps(found: set[Numbers], depth: int, count: int) -> list[Numbers]:
    """All numbers up to the highest that is there, the first ones up to ``count`` at least."""
    if not depth:
        return [()]
    tails: dict[int, set[Numbers]] = {}
    for first, *rest in found:
        tails.setdefault(first, set()).add(tuple(rest))
    count = max(count, 1 + max(tails, default=0))
    return [(n, *rest) for n in range(count) for rest in _without_gaps(tails.get(n, set()), depth - 1, 1)]


def _module(part: Part, side: int, numbers: Numbers, levels: int) -> str:
    keys = re.findall(r"{(\w+)}", part.module[side])
    shown = dict(zip(keys, numbers, strict=True)) if numbers else dict.fromkeys(keys, levels - 1)  # {coarsest}
    if side == OURS and "next" in shown:
        shown["next"] += 1
    if side == OURS and "level" in shown:
        shown["level"] = levels - 1 - shown["level"]
    return part.module[side].format(**shown)


def _names(parts: Iterable[Part], names: Collection[str], side: int) -> dict[str, str]:
    """What the weights of a network are called on this side, and on the other."""
    found = {part: _found(part, names, side) for part in parts}
    counts = [1 + max(at)[0] - part.more for part, at in found.items() if at and part.more is not None]
    levels = max(counts, default=1)
    result = {}
    for part, at in found.items():
        depth = part.module[THEIRS].count("{")
        for numbers in _without_gaps(at, depth, 1 if part.more is None else levels + part.more):
            old, new = (_module(part, s, numbers, levels) for s in (side, 1 - side))
            result |= {join(old, weight[side]): join(new, weight[1 - side]) for weight in part.weights}
    return result


def rename(state: Mapping[str, Tensor], network: str, side: int) -> dict[str, Tensor]:
    """The weights under the names of the other side.

    Args:
        state: all weights of a network, and nothing else.
        network: one of ``NETWORKS``.
        side: of the names in ``state``, ``THEIRS`` or ``OURS``.

    Raises:
        ValueError: when a name is not known, or a weight is missing.
    """
    parts, choices = NETWORKS[network].parts, NETWORKS[network].one_of
    chosen = [part for part in choices if _found(part, state, side)]
    if choices and len(chosen) != 1:
        raise ValueError(f"a '{network}' has one of {[p.module[side] for p in choices]}, this one has {len(chosen)}")
    names = _names((*parts, *chosen), state, side)
    for problem, which in (("unknown", state.keys() - names), ("missing", names.keys() - state)):
        if which:
            listed = ", ".join(f"'{name}'" for name in sorted(which)[:5])
            raise ValueError(f"not a '{network}' as known here: {len(which)} weights are {problem}, such as {listed}")
    return {new: state[old] for old, new in names.items()}


def without_prefix(state: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """A published state dict without what stands before all names, buffers and unused weights.

    Args:
        state: as the authors saved it.
        network: one of ``NETWORKS``.

    Raises:
        ValueError: when it is none of this network.
    """
    anchor = NETWORKS[network].anchor
    prefixes = [name.removesuffix(anchor) for name in state if f".{name}".endswith(f".{anchor}")]
    if not prefixes:
        other = [key for key, one in NETWORKS.items() if any(f".{name}".endswith(f".{one.anchor}") for name in state)]
        hint = f"; it seems to be a '{other[0]}'" if other else ""
        raise ValueError(f"not a published '{network}': it has no '{anchor}' but {sorted(state)[:3]}, ...{hint}")
    bare = {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items() if not _BUFFER.search(name)}
    bare.pop(NETWORKS[network].unused, None)
    return bare
