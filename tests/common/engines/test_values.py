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
from __future__ import annotations

import gc
import weakref

import torch

from common.engines.values import PairValues


def test_what_was_computed_goes_with_the_values() -> None:
    # Were they to wait for the garbage collector, every iteration would keep its fields and their graph.
    gc.disable()
    try:
        ddf = torch.zeros(1, 2, 4, 4, requires_grad=True)
        values = PairValues({"moving": torch.ones(1, 1, 4, 4)}, {"ddf": ddf})
        moved = weakref.ref(values["moved"])
        assert moved() is not None
        del values
        assert moved() is None
    finally:
        gc.enable()
