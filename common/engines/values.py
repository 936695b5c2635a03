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
"""What is known of a batch of pairs: loaded, predicted, or computed when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.metrics import learn2reg_labels
from common.spatial import warp, warp_labels

__all__ = ["PairValues", "stack_pair"]


def stack_pair(batch: Mapping[str, Any]) -> Tensor:
    """Concatenate moving and fixed along channels, as every network takes them.

    Args:
        batch: holds ``moving`` and ``fixed``, each (B, C, *S).

    Returns:
        (B, 2C, *S).

    Raises:
        ValueError: when the two images lie on grids of different size.
    """
    moving, fixed = batch["moving"], batch["fixed"]
    if moving.shape != fixed.shape:
        raise ValueError(
            f"moving and fixed must have the same shape to be registered, got {tuple(moving.shape)} and "
            f"{tuple(fixed.shape)}; pad both to one spatial_size"
        )
    return torch.cat([moving, fixed], dim=1)


class PairValues(Mapping[str, Any]):
    """The names that losses and metrics ask for, over one batch.

    A name is looked for among the fields the network predicted, then in the batch, then among the values that can be
    computed: ``moved`` and ``moved_mask`` (linear), ``moved_label`` (linear one-hot, argmax), ``moved_label_l2r``
    (nearest voxel, as Learn2Reg's organisers warp labels), and the differentiable
    ``moving_onehot``, ``fixed_onehot`` and ``moved_onehot`` (one channel per entry of ``labels``),
    ``inverse_moved`` and ``inverse_moved_onehot`` (the fixed image and its labels, brought to the moving grid by the
    network's ``inverse_ddf``), and ``moving_spacing`` and ``fixed_spacing`` (B, d), voxel sizes in mm from the affines.

    Args:
        batch: what the loader gave, on the device.
        fields: what ``RegistrationNetwork.fields`` gave; ``ddf`` (B, d, *S) among it.
        labels: foreground labels, one channel each in the one-hot values.
    """

    def __init__(self, batch: Mapping[str, Any], fields: Mapping[str, Any], labels: Sequence[int] = ()) -> None:
        self._known: dict[str, Any] = {**batch, **fields}
        self._labels = tuple(int(label) for label in labels)
        # Functions of these values, not bound to them: a cycle would keep fields and graphs until it is collected.
        self._computed: dict[str, tuple[str, Callable[[PairValues], Tensor]]] = {
            "moved": ("moving", lambda v: warp(v["moving"], v["ddf"])),
            "moved_mask": ("moving_mask", lambda v: warp(v["moving_mask"].float(), v["ddf"], padding="zeros")),
            "moved_label": ("moving_label", lambda v: warp_labels(v["moving_label"], v["ddf"])),
            "moved_label_l2r": ("moving_label", lambda v: learn2reg_labels(v["moving_label"], v["ddf"])),
            "moving_onehot": ("moving_label", lambda v: v._one_hot(v["moving_label"])),
            "fixed_onehot": ("fixed_label", lambda v: v._one_hot(v["fixed_label"])),
            "moved_onehot": ("moving_label", lambda v: warp(v["moving_onehot"], v["ddf"])),
            "inverse_moved": ("inverse_ddf", lambda v: warp(v["fixed"], v["inverse_ddf"])),
            "inverse_moved_onehot": ("inverse_ddf", lambda v: warp(v["fixed_onehot"], v["inverse_ddf"])),
            "moving_spacing": ("moving_affine", lambda v: v["moving_affine"][:, :-1, :-1].norm(dim=1)),
            "fixed_spacing": ("fixed_affine", lambda v: v["fixed_affine"][:, :-1, :-1].norm(dim=1)),
        }

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            source, compute = self._computed.get(name, ("", None))
            if compute is None or source not in self._known:
                raise KeyError(name)
            self._known[name] = compute(self)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        if name in self._known:
            return True
        return name in self._computed and self._computed[str(name)][0] in self._known

    def __iter__(self) -> Iterator[str]:
        return iter([*self._known, *(n for n in self._computed if n not in self._known and n in self)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _one_hot(self, label_map: Tensor) -> Tensor:
        if not self._labels:
            raise ValueError("one-hot labels were asked for, but no labels were given to the trainer or evaluator")
        return torch.cat([label_map == label for label in self._labels], dim=1).float()

    def known(self) -> dict[str, Any]:
        """What has been loaded, predicted or computed so far, with tensors detached from the graph."""
        return {name: _detached(value) for name, value in self._known.items()}


def _detached(value: Any) -> Any:
    """A value without the graph it came from, also in a list of fields."""
    if isinstance(value, Tensor):
        return value.detach()
    return [_detached(entry) for entry in value] if isinstance(value, (list, tuple)) else value
