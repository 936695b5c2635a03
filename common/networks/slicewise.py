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
"""A 2-D network on stacks of slices."""

from __future__ import annotations

import torch
from torch import Tensor

from common.networks.base import RegistrationNetwork, split_pair

__all__ = ["SliceWise", "for_stacks"]


class SliceWise(RegistrationNetwork):
    """Registers the slices of a stack one by one and gives one 3-D field, whose part along the last axis is 0.

    So a stack is one pair for metrics, tables and files, and its field has the same meaning as any other.

    Args:
        network: a 2-D network.

    Raises:
        ValueError: when the network is not 2-D.
    """

    def __init__(self, network: RegistrationNetwork) -> None:
        super().__init__(3)
        if network.spatial_dims != 2:
            raise ValueError(f"slices need a 2-D network, got one with spatial_dims {network.spatial_dims}")
        self.network = network

    def fields(self, image: Tensor) -> dict[str, Tensor]:
        """The "ddf" (B, 3, X, Y, Z) of the pair ``image`` (B, 2C, X, Y, Z)."""
        split_pair(image, self.spatial_dims)
        batch, slices = image.shape[0], image.shape[-1]
        flat = image.movedim(-1, 1).flatten(0, 1)
        ddf = self.network.fields(flat)["ddf"].unflatten(0, (batch, slices)).movedim(1, -1)
        return {"ddf": torch.cat([ddf, torch.zeros_like(ddf[:, :1])], dim=1)}


def for_stacks(network: RegistrationNetwork, stacks: bool = True) -> RegistrationNetwork:
    """The network as it is, or wrapped for stacks of slices: a choice that a config can make.

    Args:
        network: 2-D, where there are stacks.
        stacks: whether the images are stacks.
    """
    return SliceWise(network) if stacks else network
