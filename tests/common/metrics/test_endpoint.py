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
"""The end-point error is a mean distance."""

from __future__ import annotations

import pytest
import torch

from common.metrics import EndpointError


@pytest.mark.parametrize("d", [2, 3])
def test_a_constant_offset_gives_its_length_in_voxels_and_in_mm(d: int) -> None:
    true = torch.randn(2, d, *(5, 6, 7)[:d])
    offset = torch.zeros_like(true)
    offset[:, 0], offset[:, 1] = 3.0, 4.0
    assert torch.allclose(EndpointError()(true + offset, true), torch.full((2, 1), 5.0), atol=1e-5)
    spacing = (2.0, 1.0, 1.0)[:d]
    assert torch.allclose(EndpointError(spacing)(true + offset, true), torch.full((2, 1), 52.0**0.5), atol=1e-5)


def test_only_the_mask_counts() -> None:
    true, mask = torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    ddf = torch.zeros(1, 2, 4, 4)
    ddf[:, 0, :2], ddf[:, 0, 2:] = 1.0, 100.0
    assert EndpointError()(ddf, true, mask).item() == pytest.approx(1.0)


def test_fields_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(1, 2, 4, 5\)"):
        EndpointError()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5))
