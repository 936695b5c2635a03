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

from common.metrics import InverseConsistency
from common.spatial import invert


@pytest.mark.parametrize("dims", [2, 3])
def test_shifts_that_do_not_undo_each_other(dims: int, device: torch.device) -> None:
    ddf = torch.zeros(2, dims, *(6, 5, 7)[:dims], device=device)
    inverse = torch.zeros_like(ddf)
    ddf[:, 0], inverse[:, 0] = 2.0, -2.0
    inverse[1, 1] = 1.5  # undone along the first axis only
    values = InverseConsistency()(ddf, inverse)
    assert values.cpu().tolist() == [[0.0], [1.5]]


def test_the_field_is_read_where_the_inverse_leads() -> None:
    """``x -> 2x`` and ``x -> x/2`` undo each other, though the fields are not each other's negative."""
    x = torch.arange(9.0).view(1, 1, 9, 1).expand(1, 1, 9, 4)
    still = torch.zeros_like(x)
    double, half = torch.cat([x, still], 1), torch.cat([-x / 2, still], 1)
    assert InverseConsistency()(double, half).item() == pytest.approx(0.0, abs=1e-6)
    assert InverseConsistency()(double, -double).item() > 1


def test_a_numerical_inverse_is_consistent() -> None:
    ddf = torch.nn.functional.interpolate(
        torch.randn(1, 3, 3, 3, 3), (12, 12, 12), mode="trilinear", align_corners=True
    )
    assert InverseConsistency()(0.5 * ddf, invert(0.5 * ddf).ddf).item() < 0.01


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\) and \(2, 2, 4, 4\)"):
        InverseConsistency()(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 4, 4))
