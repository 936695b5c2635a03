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
"""What a config of a bundle has to hold to. Each rule gives the list of what breaks it, empty when nothing does.

Rules for one file take its text or its content; rules for what MONAI makes of several files take the merged content.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import pydoc
import re
from collections.abc import Iterator, Sequence
from typing import Any

from monai.bundle.reference_resolver import ReferenceResolver

LONGEST_EXPRESSION = 120
LONGEST_LINE = 120

_NODES = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Attribute, ast.Subscript, ast.Slice, ast.Call, ast.keyword),
    *(ast.IfExp, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult),
    *(ast.FloorDiv, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.Gt, ast.LtE, ast.GtE, ast.In, ast.NotIn, ast.Is),
    *(ast.IsNot, ast.List, ast.Tuple, ast.Starred),
)
_FUNCTIONS = {"getattr", "hasattr", "len", "list", "max", "min", "range"}
_METHODS = {"bundle_root", "device", "is_available", "is_initialized", "parameters", "run", "startswith"}
_REFERENCE = re.compile(r"@\w+(?:(?:#|::)\w+)*")
_BARE_TARGETS = ("monai.data", "monai.transforms", "monai.inferers", "monai.handlers")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def duplicate_keys(text: str) -> list[str]:
    """Keys that one object of a JSON has twice: readers keep the last one without a word."""
    found: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        found.extend(f"'{key}' twice" for key in sorted(set(keys)) if keys.count(key) > 1)
        return dict(pairs)

    json.loads(text, object_pairs_hook=look)
    return found


def layout(text: str) -> list[str]:
    """Breaks of the layout: four spaces a level, one space after ``:`` and ``,``, none inside brackets, short lines."""
    found = [] if text.endswith("}\n") and not text.endswith("\n\n") else ["the file does not end with one newline"]
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        bare = _STRING.sub('""', line.strip())
        opening, closing = (sum(bare.count(bracket) for bracket in kind) for kind in ("[{", "]}"))
        if line != " " * 4 * (depth - (bare[:1] in ("]", "}"))) + line.strip():
            found.append(f"line {number}: not indented by four spaces a level, or spaces at its end")
        if re.search(r":(?! \S)|,(?! \S|$)|[\[{] | [\]}]| :| ,|  ", bare):
            found.append(f"line {number}: spaces around ':' or ',' or inside brackets")
        if len(line) > LONGEST_LINE:
            found.append(f"line {number}: {len(line)} characters")
        depth += opening - closing
    return found


def imports(config: dict[str, Any]) -> list[str]:
    """Import statements that MONAI would let fail or ignore without a word, and names that no expression uses."""
    found = []
    used = {name.id for text in expressions(config) for name in ast.walk(parse(text)) if isinstance(name, ast.Name)}
    for statement in import_statements(config):
        (node,) = ast.parse(statement).body
        assert isinstance(node, ast.Import | ast.ImportFrom)
        if len(node.names) != 1:
            found.append(f"'{statement}' imports several names: MONAI takes the first")
            continue
        alias = node.names[0]
        try:
            if isinstance(node, ast.ImportFrom):
                getattr(importlib.import_module(node.module or ""), alias.name)
            else:
                importlib.import_module(alias.name)
        except (ImportError, AttributeError, ValueError) as error:
            found.append(f"'{statement}' fails: {error}")
        name = alias.asname or (alias.name if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0])
        if "." in alias.name and not alias.asname:
            found.append(f"'{statement}': MONAI makes the name '{alias.name}', which no expression can write")
        elif name not in used:
            found.append(f"'{statement}' is not used")
    return found


def expression_rules(config: dict[str, Any]) -> list[str]:
    """Expressions that are long, or do more than choose, add up and call a few known functions."""
    found = []
    for text in expressions(config):
        problem = _expression_problem(text)
        if problem:
            found.append(f"'{text}' {problem}")
    return found


def _expression_problem(text: str) -> str:
    if len(text) > LONGEST_EXPRESSION:
        return f"has {len(text)} characters"
    if "__" in text:
        return "has two underscores"
    try:
        tree = parse(text)
    except SyntaxError as error:
        return f"is no expression: {error.msg}"
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return f"has a {type(node).__name__}"
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            return f"reads the private '{node.attr}'"
        if isinstance(node, ast.Call):
            known = (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS) or (
                isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS
            )
            if not known:
                return f"calls '{ast.unparse(node.func)}'"
    return ""


def names(config: dict[str, Any]) -> list[str]:
    """Names in the expressions of a merged config that nothing imports."""
    known = {statement.split()[-1] for statement in import_statements(config)} | _FUNCTIONS
    found = []
    for text in expressions(config):
        free = {node.id for node in ast.walk(parse(text)) if isinstance(node, ast.Name)}
        found += [f"'{text}': '{name}' is not imported" for name in sorted(free - known - {"_reference"})]
    return found


def references(config: dict[str, Any], roots: Sequence[str] = ()) -> list[str]:
    """``@references`` of a merged config that lead nowhere, or back to where they start.

    Args:
        config: what MONAI makes of the files.
        roots: look only at what these keys need, directly or not; at everything by default. An overlay that serves
            several jobs may bring what one of them does not use.
    """
    arrows = {
        place: [target.replace("#", "::") for target in ReferenceResolver.match_refs_pattern(text)]
        for place, text in _places(config)
    }
    arrows = {place: targets for place, targets in arrows.items() if targets}
    needed = _needed(arrows, roots) if roots else set(arrows)
    pairs = [(place, target) for place in arrows if place in needed for target in arrows[place]]
    found = [f"{place}: '@{target}' leads nowhere" for place, target in pairs if not _has(config, target)]
    return found or _circles({place: arrows[place] for place in needed})


def _below(arrows: dict[str, list[str]], target: str) -> list[str]:
    """A reference needs what it names, with all that lies below it."""
    return [place for place in arrows if place == target or place.startswith(f"{target}::")]


def _needed(arrows: dict[str, list[str]], roots: Sequence[str]) -> set[str]:
    needed: set[str] = set()
    waiting = [place for root in roots for place in _below(arrows, root)]
    while waiting:
        place = waiting.pop()
        if place not in needed:
            needed.add(place)
            waiting += [further for target in arrows[place] for further in _below(arrows, target)]
    return needed


def _circles(arrows: dict[str, list[str]]) -> list[str]:
    done: set[str] = set()

    def walk(place: str, path: tuple[str, ...]) -> str:
        if place in path:
            return " -> ".join([*path[path.index(place) :], place])
        if place in done:
            return ""
        for following in [further for target in arrows[place] for further in _below(arrows, target)]:
            circle = walk(following, (*path, place))
            if circle:
                return circle
        done.add(place)
        return ""

    circle = next((found for found in (walk(place, ()) for place in sorted(arrows)) if found), "")
    return [f"a circle: {circle}"] if circle else []


def targets(config: dict[str, Any]) -> list[str]:
    """Components of a merged config that cannot be imported here, or do not take their arguments."""
    found = []
    for place, component in _components(config):
        name = component["_target_"]
        located = _locate(name)
        if located is None:
            found.append(f"{place}: there is no '{name}'")
            continue
        arguments = {key: value for key, value in component.items() if not key.startswith("_")}
        try:
            signature = inspect.signature(located)
            (signature.bind_partial if component.get("_mode_") in ("callable", "partial") else signature.bind)(
                **arguments
            )
        except TypeError as error:
            found.append(f"{place}: {name}: {error}")
    return found


def _locate(name: str) -> Any:
    if "." in name:
        return pydoc.locate(name)
    modules = [importlib.import_module(module) for module in _BARE_TARGETS]
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def order(config: dict[str, Any], sequence: Sequence[str]) -> list[str]:
    """Neighbours among the keys of a config that ``sequence`` has the other way round."""
    known = [key for key in config if key in sequence]
    pairs = itertools.pairwise(known)
    return [f"'{one}' before '{two}'" for one, two in pairs if sequence.index(one) > sequence.index(two)]


def strings(value: object) -> Iterator[str]:
    """Every string in a config."""
    for _, text in _places(value):
        yield text


def expressions(config: dict[str, Any]) -> list[str]:
    """Every ``$`` expression of a config, without its ``$``, but the imports."""
    found = [text[1:].strip() for text in strings(config) if text.startswith("$")]
    return [text for text in found if not _is_import(text)]


def import_statements(config: dict[str, Any]) -> list[str]:
    """Every ``$import`` of a config, without its ``$``."""
    found = [text[1:].strip() for text in strings(config) if text.startswith("$")]
    return [text for text in found if _is_import(text)]


def parse(text: str) -> ast.Expression:
    """An expression with its references as names, as MONAI evaluates it."""
    return ast.parse(_REFERENCE.sub("_reference", text), mode="eval")


def _is_import(text: str) -> bool:
    return re.match(r"(import|from)\s", text) is not None


def _places(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every string with its place, such as ``train::handlers::0::name``."""
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, f"{place}::{key}" if place else str(key))


def _components(value: object, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict) and "_target_" in value:
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _components(part, f"{place}::{key}" if place else str(key))


def _has(config: Any, place: str) -> bool:
    for part in place.split("::"):
        if isinstance(config, list) and part.isdigit() and int(part) < len(config):
            config = config[int(part)]
        elif isinstance(config, dict) and part in config:
            config = config[part]
        else:
            return False
    return True
