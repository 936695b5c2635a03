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

import pytest
import torch

from common.metrics import RootMeanSquareError


@pytest.mark.parametrize("size", [(4, 5), (4, 5, 6)])
def test_rmse_of_known_differences(size: tuple[int, ...], device: torch.device) -> None:
    fixed = torch.zeros(2, 1, *size, device=device)
    moved = fixed.clone()
    moved[0] += 3.0
    moved[1, :, :2] = 2.0  # half of the voxels
    metric = RootMeanSquareError()
    assert torch.allclose(metric(moved, fixed).cpu(), torch.tensor([[3.0], [2.0**0.5]]))
    assert float(metric.aggregate()) == pytest.approx((3 + 2**0.5) / 2)
    mask = torch.zeros_like(moved)
    mask[:, :, :1] = 1
    assert torch.allclose(metric(moved, fixed, mask).cpu(), torch.tensor([[3.0], [2.0]]))


def test_it_agrees_with_monais() -> None:
    from monai.metrics import RMSEMetric

    a, b = torch.rand(2, 3, 1, 11, 9)
    assert torch.allclose(RootMeanSquareError()(a, b), RMSEMetric()(a, b), atol=1e-6)


def test_shapes_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 4\) and \(1, 1, 4, 3\)"):
        RootMeanSquareError()(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 4, 3))
