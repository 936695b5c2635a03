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
"""Handing encoder weights from one model to another, also across window sizes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LoadReport", "interpolate_bias_tables", "load_encoder_weights"]

_TABLE = "relative_position_bias_table"
logger = logging.getLogger(__name__)


class LoadReport(NamedTuple):
    """What became of a set of weights: the names that were loaded, resampled on the way, absent and not used."""

    loaded: list[str]
    interpolated: list[str]
    missing: list[str]
    unexpected: list[str]


def _resample_table(table: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear interpolation of (heads, *offsets) to other offsets: no offset stays the middle, the farthest the end."""
    # An axis of one entry holds the offset 0 only, which is the middle of the source, not its first end.
    for axis, (have, want) in enumerate(zip(table.shape[1:], size, strict=True), start=1):
        if want == 1:
            table = table.narrow(axis, have // 2, 1)
    if tuple(table.shape[1:]) == size:
        return table
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(table[None].float(), size=size, mode=mode, align_corners=True)[0].to(table.dtype)


def interpolate_bias_tables(state_dict: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Fit the relative position bias tables of a state dict to the windows of an encoder.

    A table is a function of the offset between two tokens over [-(w-1), w-1] along each axis; it is stretched to the
    new window by linear interpolation. Tables of the right size come back as they are.

    Args:
        state_dict: weights under the encoder's own names.
        encoder: the model that is to receive them.

    Returns:
        a new dict; every entry but the resampled tables is the same tensor.

    Raises:
        ValueError: when a table has another number of heads or of axes than the encoder's.
    """
    targets = {name: p.shape for name, p in encoder.named_parameters() if name.rpartition(".")[2] == _TABLE}
    result = dict(state_dict)
    for name, target in targets.items():
        table = result.get(name)
        if table is None or table.shape == target:
            continue
        if table.ndim != len(target) or table.shape[0] != target[0]:
            raise ValueError(f"{name} has shape {tuple(table.shape)}, which cannot be fitted to {tuple(target)}")
        result[name] = _resample_table(table, tuple(target[1:]))
    return result


def _encoder_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights out of a whole network's (names that begin with ``encoder.``), or all of them."""
    part = {name.removeprefix("encoder."): v for name, v in state_dict.items() if name.startswith("encoder.")}
    return part or dict(state_dict)


def load_encoder_weights(encoder: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True) -> LoadReport:
    """Load an encoder from the weights of an encoder or of a network that has one.

    Args:
        encoder: receives the weights, in place.
        state_dict: an encoder's, or a network's with ``encoder.`` before the encoder's names (other names are ignored).
        strict: every weight of the encoder must be there.

    Returns:
        what was loaded, resampled to another window, missing and left over.

    Raises:
        ValueError: when a weight has the wrong shape (both shapes are named), nothing fits, or ``strict`` and weights
            are missing.
    """
    given = _encoder_part(state_dict)
    own = encoder.state_dict()
    fitted = interpolate_bias_tables(given, encoder)
    loaded = [name for name in own if name in fitted]
    missing = [name for name in own if name not in fitted]
    if not loaded or (strict and missing):
        raise ValueError(
            f"{len(missing)} of {len(own)} encoder weights are not in the state dict, such as {missing[:3]}; "
            f"it has {sorted(given)[:3]}, ..."
        )
    for name in loaded:
        if fitted[name].shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(fitted[name].shape)}, the encoder needs {tuple(own[name].shape)}"
            )
    report = LoadReport(
        loaded=loaded,
        interpolated=[name for name in loaded if fitted[name] is not given[name]],
        missing=missing,
        unexpected=[name for name in given if name not in own],
    )
    encoder.load_state_dict({name: fitted[name] for name in loaded}, strict=False)
    logger.info(
        "loaded %d encoder weights (%d resampled to another window), %d missing, %d not used",
        *(len(names) for names in report),
    )
    return report
