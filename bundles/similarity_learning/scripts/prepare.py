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
"""What must be known of the data before training begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["atlas_image"]


class Items(Protocol):
    """A dataset."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One item."""
        ...


def atlas_image(dataset: Items) -> Tensor:
    """The fixed image that q_f is of: the first pair's, as training will see it.

    That every other pair has the same one is checked when training meets it.

    Args:
        dataset: of pairs, with ``fixed`` (1, *S).

    Returns:
        (1, 1, *S), float32.

    Raises:
        ValueError: when the image has several channels.
    """
    fixed: Tensor = dataset[0]["fixed"]
    if fixed.shape[0] != 1:
        raise ValueError(f"a similarity is learnt on images of one channel, the atlas is {tuple(fixed.shape)}")
    return fixed.detach().float()[None].clone()
