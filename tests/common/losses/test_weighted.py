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
"""The weighted sum of named terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from common.losses import LNCC, MSE, BendingEnergy, Diffusion, WeightedLosses


class Scale(nn.Module):
    """A term with a parameter and a buffer, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(1.0))
        self.calls = 0

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * value.sum() + self.shift


class Lazy(Mapping[str, Any]):
    """Computes on demand, and remembers what was asked for."""

    def __init__(self, **values: Any) -> None:
        self.values_by_name, self.asked = values, []

    def __getitem__(self, key: str) -> Any:
        self.asked.append(key)
        return self.values_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


def term(**changes: Any) -> dict[str, Any]:
    return {"term": MSE(), "inputs": ["moved", "fixed"], "weight": 1.0, **changes}


@pytest.fixture
def values() -> dict[str, Tensor]:
    return {"moved": torch.rand(1, 1, 8, 8), "fixed": torch.rand(1, 1, 8, 8), "ddf": torch.rand(1, 2, 8, 8)}


def test_total_and_named_terms(values: dict[str, Tensor]) -> None:
    values["ddf"].requires_grad_()
    terms = {"similarity": term(), "smoothness": {"term": Diffusion(), "inputs": ["ddf"], "weight": 0.25}}
    total, named = WeightedLosses(terms)(values)
    assert list(named) == ["similarity", "smoothness"]
    similarity, smoothness = MSE()(values["moved"], values["fixed"]), Diffusion()(values["ddf"])
    assert named["similarity"].item() == pytest.approx(similarity.item())
    assert named["smoothness"].item() == pytest.approx(smoothness.item())  # without its weight
    assert total.item() == pytest.approx((similarity + 0.25 * smoothness).item())
    assert total.shape == ()
    assert not named["smoothness"].requires_grad
    (found,) = torch.autograd.grad(total, values["ddf"])
    torch.testing.assert_close(found, 0.25 * torch.autograd.grad(smoothness, values["ddf"])[0])


def test_weight_is_one_by_default(values: dict[str, Tensor]) -> None:
    total, named = WeightedLosses({"a": {"term": MSE(), "inputs": ("moved", "fixed")}})(values)
    assert total.item() == named["a"].item()


def test_only_what_is_needed_is_looked_up(values: dict[str, Tensor]) -> None:
    lazy = Lazy(**values, costly="must not be touched")
    losses = WeightedLosses(
        {
            "a": term(),
            "off": {"term": BendingEnergy(), "inputs": ["ddf"], "weight": 0},
            "gone": term(inputs=["nothing"], weight=0.0),
        }
    )
    _, named = losses(lazy)
    assert lazy.asked == ["moved", "fixed"]
    assert list(named) == ["a"]


def test_all_weights_zero_is_zero() -> None:
    total, named = WeightedLosses({"a": term(weight=0)})({})
    assert total.item() == 0
    assert named == {}


def test_parameters_and_buffers_are_registered() -> None:
    losses = WeightedLosses({"a": {"term": Scale(), "inputs": ["x"]}})
    assert set(losses.state_dict()) == {"terms.a.factor", "terms.a.shift"}
    assert losses.double()({"x": torch.ones(3, dtype=torch.float64)})[0].item() == 7


def test_mask_is_one_more_input(values: dict[str, Tensor]) -> None:
    values["mask"] = (torch.rand(1, 1, 8, 8) > 0.5).float()
    total, _ = WeightedLosses({"a": term(inputs=["moved", "fixed", "mask"])})(values)
    assert total.item() == pytest.approx(MSE()(values["moved"], values["fixed"], values["mask"]).item())


def test_as_a_config_writes_it(values: dict[str, Tensor]) -> None:
    terms = {
        "similarity": {
            "term": {"_target_": "common.losses.LNCC", "window": 5},
            "inputs": ["moved", "fixed"],
            "weight": 1,
        },
        "smoothness": {"term": {"_target_": "common.losses.Diffusion"}, "inputs": ["ddf"], "weight": 0.5},
    }
    expected = LNCC(5)(values["moved"], values["fixed"]) + 0.5 * Diffusion()(values["ddf"])
    parsed = ConfigParser({"loss": {"_target_": "common.losses.WeightedLosses", "terms": terms}})
    for losses in (parsed.get_parsed_content("loss"), WeightedLosses(terms)):
        assert losses(values)[0].item() == pytest.approx(expected.item())
        assert losses.terms["similarity"].window == 5


def test_missing_input_names_everything(values: dict[str, Tensor]) -> None:
    with pytest.raises(KeyError, match=r"term 'a' needs 'velocity', but there is only \['ddf', 'fixed', 'moved'\]"):
        WeightedLosses({"a": term(inputs=["velocity"])})(values)


def test_a_term_must_give_one_number(values: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"term 'a' must give one number, got \(1, 1, 8, 8\)"):
        WeightedLosses({"a": term(term=nn.Identity(), inputs=["moved"])})(values)
    total, _ = WeightedLosses({"a": term(term=nn.Identity(), inputs=["x"])})({"x": torch.ones(1, 1)})
    assert total.shape == ()


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ({}, ValueError, "at least one term"),
        ([term()], ValueError, "must be a mapping"),
        ({"a.b": term()}, ValueError, "without a dot"),
        ({"a": MSE()}, TypeError, "term 'a' must be a mapping, got MSE"),
        ({"a": {"term": MSE()}}, KeyError, r"term 'a' .*missing \['inputs'\]"),
        ({"a": term(wieght=2)}, KeyError, r"unknown \['wieght'\]"),
        ({"a": term(term=torch.nn.functional.mse_loss)}, TypeError, "must be a torch module, got function"),
        ({"a": term(inputs="moved")}, TypeError, "must be a list of names, got 'moved'"),
        ({"a": term(inputs=[1])}, TypeError, "must be a list of names"),
        ({"a": term(inputs=[])}, ValueError, "at least one value"),
        ({"a": term(weight="1")}, TypeError, "must be a number, got '1'"),
        ({"a": term(weight=True)}, TypeError, "must be a number, got True"),
        ({"a": term(weight=-1.0)}, ValueError, "finite and not negative, got -1.0"),
        ({"a": term(weight=float("nan"))}, ValueError, "finite and not negative, got nan"),
        ({"a": term(weight=0, inputs=[])}, ValueError, "at least one value"),
    ],
)
def test_what_is_refused(terms: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WeightedLosses(terms)
