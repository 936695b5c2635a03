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
"""The head of a level."""

from __future__ import annotations

import pytest
import torch

from bundles.dual_stream_pyramid.scripts.heads import PredictionHead


def test_the_head_starts_near_zero_and_answers_in_float32(device: torch.device) -> None:
    head = PredictionHead(2, 6, 8).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        motion = head(torch.randn(1, 6, 9, 7, device=device))
    assert motion.dtype == torch.float32 and motion.shape == (1, 2, 9, 7)
    assert 0 < motion.abs().max() < 1e-3
    assert head.flow.conv.weight.std().item() == pytest.approx(1e-5, rel=0.3)
