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
"""The authors' HyperTransMorphSPR checkpoints as ours.

    python bundles/spatially_varying_reg/scripts/convert_hyper.py SRC DST.pt

``DST.pt`` is a plain state dict of ``HyperTransMorphSPR(generator="full")``. A name is the plain network's, but for the
two maps that make a layer's weight and bias, for the layers' places within a unit, and for the MLP. Dropped are, beside
what ``convert.py`` drops, maps to biases that no layer of theirs adds: those of units with a norm, and of queries, keys
and values.

The names are those of the authors' source code; no checkpoint of theirs was at hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.io.published import infer_window, read_checkpoint, rename

if __package__:
    from . import convert as plain
else:  # as a script: its folder is on the path, no package is
    import convert as plain  # type: ignore[no-redef]

__all__ = ["convert", "to_published", "to_warpzoo"]

logger = logging.getLogger(__name__)

_THEIR_MLP, _OUR_MLP = "hyper_model.fcs.", "hyper_mlp.layers."
_OUR_MAPS, _OUR_TEMPLATE = "generator.maps.", "template."
_KINDS = (  # the map of a layer, the weight that it makes
    ("{rest}.linear_wts.weight", "{rest}.weight"),
    ("{rest}.linear_conv.weight", "{rest}.weight"),
    ("{rest}.linear_bias.weight", "{rest}.bias"),
)
_PLACES = (  # in the hyper network, in the plain one
    ("up{n}.conv{k}.conv.{rest}", "up{n}.conv{k}.0.{rest}"),
    ("up3s.{t}.conv{k}.conv.{rest}", "up3s.{t}.conv{k}.0.{rest}"),
    ("cs.{t}.conv.{rest}", "cs.{t}.0.{rest}"),
    ("cs.{t}.nm.{rest}", "cs.{t}.1.{rest}"),
    ("c1.conv.{rest}", "c1.0.{rest}"),
    ("c1.nm.{rest}", "c1.1.{rest}"),
    ("sigma_{n}.conv.{rest}", "sigma_{n}.0.{rest}"),
    ("sigma_{n}.nm.{rest}", "sigma_{n}.1.{rest}"),
    ("reg_heads.{t}.conv3d.{rest}", "reg_heads.{t}.0.{rest}"),
    ("reg_head.conv3d.{rest}", "reg_head.0.{rest}"),
)
_NOT_ADDED = re.compile(r"(up\d+\.conv\d|up3s\.\d+\.conv\d|cs\.\d+|c1|sigma_[01])\.0\.bias|.*\.qkv\.bias")


def to_warpzoo(state: Mapping[str, Tensor], window: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Published weights under our names and in our layout.

    Args:
        state: a published state dict.
        window: the attention window, when the sampling grids in it do not tell.

    Raises:
        ValueError: when there is no MLP, a name is not known, or the window does not fit the bias tables.
    """
    before = next((name.partition(_THEIR_MLP)[0] for name in state if _THEIR_MLP in name), None)
    if before is None:
        raise ValueError(f"no weight is called {_THEIR_MLP}*: this is no hyper network; use convert.py for a plain one")
    window = infer_window(state) if window is None else window
    ours: dict[str, Tensor] = {}
    maps: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix(before)
        made = rename(name, _KINDS)
        place = rename(made or name, _PLACES) or made or name
        if name.startswith(_THEIR_MLP):
            ours[_OUR_MLP + name.removeprefix(_THEIR_MLP)] = tensor
        elif made is None:
            others[place] = tensor
        elif not _NOT_ADDED.fullmatch(place):
            maps[place] = tensor
    ours |= {_OUR_MAPS + name: tensor for name, tensor in plain.to_warpzoo(maps, window).items()}
    return ours | {_OUR_TEMPLATE + name: tensor for name, tensor in plain.to_warpzoo(others, window).items()}


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`to_warpzoo`, without the weights that it drops.

    Args:
        state: of a ``HyperTransMorphSPR(generator="full")``.

    Raises:
        ValueError: when a name is not known.
    """
    reverse = [(ours, theirs) for theirs, ours in _PLACES]

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

    def placed(name: str) -> str:
        return rename(name, reverse) or name

    theirs = {_THEIR_MLP + name: tensor for name, tensor in part(_OUR_MLP).items()}
    theirs |= {placed(name): tensor for name, tensor in plain.to_published(part(_OUR_TEMPLATE)).items()}
    for name, tensor in plain.to_published(part(_OUR_MAPS)).items():
        path, _, kind = placed(name).rpartition(".")
        linear = ".attn." in path or ".mlp." in path
        theirs[f"{path}.linear_{'bias' if kind == 'bias' else 'wts' if linear else 'conv'}.weight"] = tensor
    if len(theirs) != len(state):
        raise ValueError(f"{len(state) - len(theirs)} weights have no place in our HyperTransMorphSPR")
    return theirs


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
    logger.info("%s: %d weights, %d numbers", destination, len(state), sum(map(Tensor.numel, state.values())))


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(convert)
