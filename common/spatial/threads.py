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
"""How many threads a piece of work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["few_threads"]

_EACH = 1 << 15  # elements that keep a thread busy for longer than it takes to wake it


@contextmanager
def few_threads(elements: int = 0) -> Iterator[None]:
    """As many threads as tensors of this size keep busy, at least one and at most as many as before.

    Work on small tensors gains little from threads, and on a busy machine loses a lot: every operation waits for the
    slowest of them.

    Args:
        elements: of one tensor.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(threads, elements // _EACH)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
