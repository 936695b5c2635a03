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
"""Each rule for configs finds what it is for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bundles import config_rules


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("lambda x: x", "Lambda"),
        ("[i for i in range(3)]", "ListComp"),
        ("(i for i in @pairs)", "GeneratorExp"),
        ("f'{@seed}'", "JoinedStr"),
        ("(x := 3)", "NamedExpr"),
        ("open('file')", "calls 'open'"),
        ("eval('1')", "calls 'eval'"),
        ("exec('1')", "calls 'exec'"),
        ("os.system('ls')", "calls 'os.system'"),
        ("subprocess.run(['ls']).args.pop()", "calls"),
        ("().__class__", "two underscores"),
        ("@network_def._modules", "private"),
        ("torch.load('model.pt')", "calls 'torch.load'"),
        ("import_module('os')", "calls"),
        ("1 +", "no expression"),
        (" + ".join(["@seed"] * 30), "characters"),
    ],
)
def test_an_expression_that_does_too_much_is_found(expression: str, problem: str) -> None:
    (found,) = config_rules.expression_rules({"train": {"handlers": [f"${expression}"]}})
    assert problem in found


def test_expressions_as_the_bundles_have_them_pass() -> None:
    good = ["@weights", "not @checkpoint", "['ddf', *@inputs]", "max(1, len(@a#b.c) // 2)", "'x' if @y > 0 else None"]
    assert config_rules.expression_rules({"run": [f"${text}" for text in good]}) == []


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("import torch", ""),
        ("import nosuchmodule as torch", "fails"),
        ("from torch import nosuchname as torch", "fails"),
        ("import torch, os", "several"),
        ("import torch.nn", "no expression can write"),
        ("import os", "not used"),
        ("from torch import nn", "not used"),
    ],
)
def test_an_import_that_fails_or_is_not_used_is_found(statement: str, problem: str) -> None:
    found = config_rules.imports({"imports": [f"${statement}"], "device": "$torch.device('cpu')"})
    assert (problem in found[0] and len(found) == 1) if problem else found == []


def test_a_key_twice_is_found() -> None:
    assert config_rules.duplicate_keys('{"a": {"b#c": 1, "d": 2, "b#c": 1}}') == ["'b#c' twice"]
    assert config_rules.duplicate_keys('{"a": {"b": 1}, "b": 1}') == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{\n    "a": [1, 2],\n    "b": [\n        {"c": 1}\n    ]\n}\n', ""),
        ('{\n    "a": 1\n}', "newline"),
        ('{\n  "a": 1\n}\n', "line 2"),
        ('{\n    "a": 1 \n}\n', "line 2"),
        ('{\n    "a":1\n}\n', "line 2"),
        ('{\n    "a": [1,2]\n}\n', "line 2"),
        ('{\n    "a": [ 1, 2]\n}\n', "line 2"),
        ('{\n    "a": [\n    1\n    ]\n}\n', "line 3"),
        ('{\n    "a": "' + "x" * 120 + '"\n}\n', "characters"),
    ],
)
def test_another_layout_is_found(text: str, problem: str) -> None:
    found = config_rules.layout(text)
    assert (found and problem in found[0]) if problem else found == []


def test_a_reference_to_nowhere_and_a_circle_are_found() -> None:
    config = {"a": "@b", "b": {"c": ["$@d + 1", 2]}, "d": 3, "text": "mail@example is text"}
    assert config_rules.references(config) == []
    assert config_rules.references({**config, "e": "$len(@b#c#5)"}) == ["e: '@b::c::5' leads nowhere"]
    assert config_rules.references({"a": {"_target_": "x", "y": "@nothing"}}) == ["a::y: '@nothing' leads nowhere"]
    unused = {**config, "e": "@nothing", "run": ["$@b"]}
    assert config_rules.references(unused, ["run"]) == [] != config_rules.references(unused)
    assert config_rules.references({**unused, "d": "@nothing"}, ["run"]) == ["d: '@nothing' leads nowhere"]
    (found,) = config_rules.references({"a": "@b", "b": {"c": ["$@d + 1"]}, "d": "$@a"})
    assert found == "a circle: a -> b::c::0 -> d -> a"


def test_a_name_that_nothing_imports_is_found() -> None:
    config = {"imports": ["$import torch", "$import torch.distributed as dist"], "a": "$torch.device('cpu')"}
    assert config_rules.names({**config, "b": "$dist.is_initialized() or len(@a)"}) == []
    assert config_rules.names({**config, "b": "$os.environ"}) == ["'os.environ': 'os' is not imported"]


@pytest.mark.parametrize(
    ("component", "problem"),
    [
        ({"_target_": "common.losses.LNCC", "window": 9, "_disabled_": True}, ""),
        ({"_target_": "SimpleInferer"}, ""),
        ({"_target_": "common.losses.LNCC", "windows": 9}, "unexpected keyword argument 'windows'"),
        ({"_target_": "common.losses.WeightedLosses"}, "missing a required argument: 'terms'"),
        ({"_target_": "common.losses.WeightedLosses", "_mode_": "partial"}, ""),
        ({"_target_": "common.losses.NoSuchLoss"}, "there is no"),
        ({"_target_": "nosuch.module.Thing"}, "there is no"),
        ({"_target_": "NoSuchTransform"}, "there is no"),
    ],
)
def test_a_component_that_does_not_exist_or_fit_is_found(component: dict[str, Any], problem: str) -> None:
    found = config_rules.targets({"loss": [{"term": component}]})
    assert (found[0].startswith("loss::0::term: ") and problem in found[0]) if problem else found == []


def test_keys_in_another_order_are_found() -> None:
    sequence = ["a", "b", "c"]
    assert config_rules.order({"a": 1, "own": 1, "c": 1}, sequence) == []
    assert config_rules.order({"a": 1, "c": 1, "own": 1, "b": 1}, sequence) == ["'c' before 'b'"]
