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
"""Threads for small tensors."""

from __future__ import annotations

import pytest
import torch

from common.spatial import few_threads


@pytest.mark.parametrize(("elements", "threads"), [(0, 1), (40**3, 1), (48**3, 3), (10**9, 4)])
def test_as_many_threads_as_there_is_work(elements: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(KeyError), few_threads(elements):
            assert torch.get_num_threads() == threads
            raise KeyError
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
