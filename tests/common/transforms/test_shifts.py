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

from common.transforms import IntensityShift


@pytest.fixture(params=[(1, 9, 7), (1, 5, 6, 7)], ids=["2d", "3d"])
def pair(request: pytest.FixtureRequest) -> dict[str, object]:
    names = {"moving_id": "a", "fixed_id": "b"}
    label = torch.ones(request.param, dtype=torch.int32)
    return {"moving": torch.rand(request.param), "fixed": torch.rand(request.param), "fixed_label": label, **names}


@pytest.mark.parametrize(
    ("kind", "strength", "expected"),
    [("gamma", None, lambda x: x**2), ("gamma", 0.5, torch.sqrt), ("inverted", None, lambda x: 1 - x)],
)
def test_formulas(pair: dict[str, torch.Tensor], kind: str, strength: float | None, expected: object) -> None:
    result = IntensityShift(kind, strength=strength)(pair)
    for role in ("moving", "fixed"):
        assert torch.allclose(result[role], expected(pair[role]))  # type: ignore[operator]
    assert result["fixed_label"] is pair["fixed_label"] and result["moving_id"] == "a"


@pytest.mark.parametrize("side", ["moving", "fixed"])
def test_one_side_leaves_the_other(pair: dict[str, torch.Tensor], side: str) -> None:
    result = IntensityShift("inverted", of=side)(pair)
    other = "fixed" if side == "moving" else "moving"
    assert torch.equal(result[other], pair[other]) and not torch.equal(result[side], pair[side])


def test_noise_is_of_the_strength_given_and_the_same_for_a_scan_in_every_pair() -> None:
    flat = torch.full((1, 200, 100), 0.5)
    pair = {"moving": flat, "fixed": flat, "moving_id": "a", "fixed_id": "b"}
    result = IntensityShift("noise", strength=0.1)(pair)
    # 20000 voxels: the deviation's own error is 0.1 / sqrt(40000) = 0.0005.
    assert abs(float(result["moving"].std()) - 0.1) < 0.003 and abs(float(result["moving"].mean()) - 0.5) < 0.004
    assert not torch.equal(result["moving"], result["fixed"])
    swapped = IntensityShift("noise", strength=0.1)({**pair, "moving_id": "b", "fixed_id": "a"})
    assert torch.equal(swapped["fixed"], result["moving"])
    assert not torch.equal(IntensityShift("noise", strength=0.1, seed=1)(pair)["moving"], result["moving"])
    loud = IntensityShift("noise", strength=2.0)(pair)["moving"]
    assert float(loud.min()) >= 0 and float(loud.max()) <= 1


def test_no_kind_is_no_change(pair: dict[str, torch.Tensor]) -> None:
    assert IntensityShift()(pair) == pair


@pytest.mark.parametrize("options", [{"kind": "blur"}, {"of": "left"}, {"kind": "gamma", "strength": 0}])
def test_what_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        IntensityShift(**options)  # type: ignore[arg-type]
