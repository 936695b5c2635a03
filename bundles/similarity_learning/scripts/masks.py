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
"""Hand the masks of a batch to a network that registers by an energy over them."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine, Events

__all__ = ["MaskFromBatch"]


class MaskFromBatch:
    """Set a network's ``fixed_mask`` from each batch of an engine, and clear it after.

    A network sees the two images only; what else a batch has reaches it by this handler. Batches without a mask count
    all voxels.

    Args:
        network: has the attribute ``fixed_mask``; not a wrapper around it.
        key: of the mask in a batch, (B, 1, *S), not 0 where voxels count.

    Raises:
        AttributeError: when the network takes no mask.

    Example:
        ``MaskFromBatch(network_def).attach(evaluator)``
    """

    def __init__(self, network: Any, key: str = "fixed_mask") -> None:
        if not hasattr(network, "fixed_mask"):
            raise AttributeError(f"{type(network).__name__} has no 'fixed_mask': it takes no mask")
        self.network, self.key = network, key

    def attach(self, engine: Engine) -> None:
        """Follow a trainer or an evaluator."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._set)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._clear)

    def _set(self, engine: Engine) -> None:
        self.network.fixed_mask = (engine.state.batch or {}).get(self.key)

    def _clear(self, engine: Engine) -> None:
        self.network.fixed_mask = None
