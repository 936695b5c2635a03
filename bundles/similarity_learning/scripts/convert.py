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
"""The authors' checkpoints as ours, and back.

    python bundles/similarity_learning/scripts/convert.py SRC DST.pt
    python bundles/similarity_learning/scripts/convert.py OURS.pt DST.pt --published True

``SRC`` is a learnt similarity (``SSD_learnt``, ``LCC_learnt``) or one of the four VoxelMorph checkpoints
(``checkpoint_VXM_...``); their names tell which. ``DST.pt`` is a plain state dict, of ``VariationalRegistration`` or of
``PublishedVoxelMorph``; what the network must be built with is logged. A name that is not known is an error. In an
unpacked bundle, which has no ``bundles`` folder and ``common`` beside ``scripts``, it is ``python -m scripts.convert``.

Nothing but tensors and numbers is ever unpickled (``weights_only=True``). The authors' own files also hold the object
that their configuration was: names of classes that are not known stand for an inert one here, so that no code of a file
is looked up, imported or run.

The VoxelMorph names were read off the authors' files; those of the similarities are of their source code, since no
such checkpoint was at hand.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.io.published import is_buffer, rename

__all__ = ["arguments_of", "convert", "read_weights", "to_published", "to_warpzoo"]

logger = logging.getLogger(__name__)

_SIMILARITY = (  # theirs, ours
    ("enc.enc.{n}.main.{rest}", "similarity.encoder.convolutions.{n}.{rest}"),
    ("agg.weight", "similarity.encoder.aggregation.weight"),
    ("kernel.weight", "similarity.kernel"),
)
_VOXELMORPH = (
    ("unet_model.downarm.{n}.main.{rest}", "unet.encoder.convs.{n}.{rest}"),
    ("unet_model.uparm.{n}.main.{rest}", "unet.decoder.{n}.{rest}"),
    ("unet_model.extras.{n}.main.{rest}", "unet.full.{n}.{rest}"),
    ("flow.{rest}", "head.conv.{rest}"),
)
_TABLES = {"similarity": _SIMILARITY, "VoxelMorph": _VOXELMORPH}
_FIRST = ("enc.enc.0.main.weight", "unet_model.downarm.0.main.weight")
_OUR_FIRST = ("similarity.encoder.convolutions.0.weight", "unet.encoder.convs.0.weight")


class _Inert:
    """What stands for a class or function of a file that is not known here: takes anything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path) -> Any:
    """The content of a checkpoint, with an inert object in the place of every foreign one."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        if foreign:
            logger.info("%s also holds objects of %s, which are left out", path, ", ".join(sorted(foreign)))
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} was not read: it is no torch checkpoint of tensors, or one with objects in it that are refused "
            f"({(str(error).splitlines() or [''])[0]}). Where the authors' code runs, take the weights out of it: "
            "torch.save({'model': checkpoint['model']}, 'weights.pt')"
        ) from error


def _state_dicts(content: Any) -> Iterator[dict[str, Tensor]]:
    """Every dict of named tensors in a checkpoint, at any depth, without what stands before all names."""
    if not isinstance(content, Mapping):
        return
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if named:
        prefix = next((n.removesuffix(end) for n in named for end in (*_FIRST, *_OUR_FIRST) if n.endswith(end)), "")
        yield {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    for value in content.values():
        yield from _state_dicts(value)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of the authors or of ours, wherever in the file they are.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read safely, or has no weights under names that are known.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found = list(_state_dicts(_load(path)))
    for state in found:
        if set(state) & {*_FIRST, *_OUR_FIRST}:
            return state
    names = sorted(name for state in found for name in state)[:5]
    raise ValueError(f"{path} holds neither {_FIRST[0]} nor {_FIRST[1]}; its tensors are {names or 'none'}")


def _table(state: Mapping[str, Tensor], side: int) -> tuple[str, list[tuple[str, str]]]:
    """Whose weights these are, and the names to look for with those to give, by the table that knows most of them."""
    tables = {kind: [(row[side], row[1 - side]) for row in rows] for kind, rows in _TABLES.items()}
    kind = max(tables, key=lambda kind: sum(rename(name, tables[kind]) is not None for name in state))
    return kind, tables[kind]


def _renamed(state: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    kind, table = _table(state, side)
    names = {name: rename(name, table) for name in state}
    unknown = sorted(name for name, new in names.items() if new is None)
    if unknown:
        whose = ("the published", "our")[side]
        raise ValueError(f"{len(unknown)} weights have no place in {whose} {kind}, such as {unknown[:3]}")
    return {new: state[name] for name, new in names.items() if new is not None}


def to_warpzoo(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under our names and in our layout.

    Args:
        state: a published state dict, of a similarity or of VoxelMorph. Sampling grids in it are dropped.

    Raises:
        ValueError: when a name is not known.
    """
    ours = _renamed({name: tensor for name, tensor in state.items() if not is_buffer(name)}, side=0)
    last = "similarity.encoder.aggregation.weight"
    if last in ours:
        # They add features up on the flattened image, by a convolution of one axis.
        axes = ours["similarity.encoder.convolutions.0.weight"].ndim - 2
        ours[last] = ours[last].reshape(*ours[last].shape[:2], *(1,) * axes)
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`to_warpzoo`: our state dict under the published names.

    Raises:
        ValueError: when a name is not known.
    """
    theirs = _renamed(state, side=1)
    if "agg.weight" in theirs:
        theirs["agg.weight"] = theirs["agg.weight"].flatten(2)
    return theirs


def arguments_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What our network must be built with to take a state dict of ours, as far as the weights tell.

    A plain "lcc" window has no weights: without a kernel in the file ``similarity`` may be either.
    """
    first = next(name for name in _OUR_FIRST if name in state)
    axes = state[first].ndim - 2
    if first == _OUR_FIRST[1]:
        return {"spatial_dims": axes, "in_channels": state[first].shape[1]}
    convolutions = [t for name, t in sorted(state.items()) if name.endswith("weight") and ".convolutions." in name]
    found: dict[str, Any] = {"spatial_dims": axes, "learnt": True, "channels": tuple(len(t) for t in convolutions)}
    if "similarity.kernel" in state:
        window = (state["similarity.kernel"].shape[-1] - 1) // 2
        found |= {"similarity": "lcc", "lcc_window": window, "train_lcc_kernel": True}
    return found


def convert(source: str, destination: str, published: bool = False) -> None:
    """Convert a checkpoint file of the authors, or one of ours to their names.

    Args:
        source: the file.
        destination: where the state dict goes.
        published: the file is ours, and their names are wanted.

    Raises:
        FileNotFoundError, ValueError: see ``read_weights``, ``to_warpzoo`` and ``to_published``.
    """
    weights = read_weights(source)
    state = to_published(weights) if published else to_warpzoo(weights)
    torch.save(state, destination)
    options = ", ".join(f"{key}={value!r}" for key, value in arguments_of(weights if published else state).items())
    logger.info("%s: %d numbers, %s", destination, sum(map(Tensor.numel, state.values())), options)


if __name__ == "__main__":
    import fire

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(convert)
