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
"""The weighted sum of named terms, as a config writes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightedLosses(nn.Module):
    """A weighted sum of loss terms, each known by its name.

    ``terms`` maps a name to ``{"term": module, "inputs": [names], "weight": number}``. A config writes the same, with
    a ``_target_`` in place of the module. ``inputs`` are the names of the term's positional arguments in the values
    that ``forward`` gets; ``weight`` is 1 when left out. A term of weight 0 is checked here but never computed, nor
    are its inputs looked up, so values that are computed on demand cost nothing.

    Args:
        terms: the terms by name. Names become log entries and sub-module names, so they hold no dot.

    Raises:
        KeyError: when a term lacks ``term`` or ``inputs``, or has a key that is none of the three.
        TypeError: when a term is no module (nor a config of one), or inputs are no list of names.
        ValueError: when there is no term, a name is unfit, inputs are empty or a weight is negative or not finite.

    Example:
        >>> from common.losses import LNCC, Diffusion
        >>> losses = WeightedLosses({
        ...     "similarity": {"term": LNCC(window=9), "inputs": ["moved", "fixed"], "weight": 1.0},
        ...     "smoothness": {"term": Diffusion(), "inputs": ["ddf"], "weight": 0.5},
        ... })
        >>> image = torch.rand(1, 1, 16, 16)
        >>> total, named = losses({"moved": image, "fixed": image, "ddf": torch.zeros(1, 2, 16, 16)})
        >>> sorted(named)
        ['similarity', 'smoothness']
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not isinstance(terms, Mapping) or not terms:
            raise ValueError(f"WeightedLosses: terms must be a mapping with at least one term, got {terms!r}")
        self.terms = nn.ModuleDict()
        self.inputs: dict[str, tuple[str, ...]] = {}
        self.weights: dict[str, float] = {}
        for name, spec in terms.items():
            self._add(name, spec)

    def _add(self, name: str, spec: Mapping[str, Any]) -> None:
        """Check one term and keep it."""
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"WeightedLosses: a term's name must be a string without a dot, got {name!r}")
        if not isinstance(spec, Mapping):
            raise TypeError(f"WeightedLosses: term '{name}' must be a mapping, got {type(spec).__name__}")
        missing, unknown = {"term", "inputs"} - set(spec), set(spec) - {"term", "inputs", "weight"}
        if missing or unknown:
            raise KeyError(
                f"WeightedLosses: term '{name}' needs 'term' and 'inputs' and may have 'weight'; "
                f"missing {sorted(missing)}, unknown {sorted(map(str, unknown))}"
            )
        self.inputs[name] = _input_names(name, spec["inputs"])
        self.weights[name] = _weight(name, spec.get("weight", 1.0))
        self.terms[name] = _module(name, spec["term"])

    def forward(self, values: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term that has a weight.

        Args:
            values: what the terms' inputs name; looked up one by one, and only where a term needs them.

        Returns:
            the total, a scalar to differentiate, and the unweighted terms by name, detached, for logs.

        Raises:
            KeyError: when an input is not among ``values``; names the term, the key and the keys there are.
            ValueError: when a term gives anything but one number.
        """
        total: Tensor | None = None
        named: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if self.weights[name] == 0:
                continue
            value = term(*(self._look_up(name, key, values) for key in self.inputs[name]))
            if not isinstance(value, Tensor) or value.numel() != 1:
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"WeightedLosses: term '{name}' must give one number, got {found}")
            value = value.reshape(())
            named[name] = value.detach()
            total = self.weights[name] * value if total is None else total + self.weights[name] * value
        return (torch.zeros(()) if total is None else total), named

    def _look_up(self, name: str, key: str, values: Mapping[str, Any]) -> Any:
        """One input of a term."""
        try:
            return values[key]
        except KeyError as error:
            there = sorted(map(str, values))
            raise KeyError(f"WeightedLosses: term '{name}' needs '{key}', but there is only {there}") from error

    def extra_repr(self) -> str:
        """Weights and inputs, for ``print(losses)``."""
        return "\n".join(f"{name}: {self.weights[name]:g} x {list(self.inputs[name])}" for name in self.terms)


def _input_names(name: str, inputs: Any) -> tuple[str, ...]:
    """The names of a term's arguments; a lone string is a mistake that would be read letter by letter."""
    if isinstance(inputs, str) or not isinstance(inputs, (list, tuple)) or not all(isinstance(k, str) for k in inputs):
        raise TypeError(f"WeightedLosses: inputs of term '{name}' must be a list of names, got {inputs!r}")
    if not inputs or not all(inputs):
        raise ValueError(f"WeightedLosses: inputs of term '{name}' must name at least one value, got {inputs!r}")
    return tuple(inputs)


def _weight(name: str, weight: Any) -> float:
    """A term's weight as a number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"WeightedLosses: weight of term '{name}' must be a number, got {weight!r}")
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"WeightedLosses: weight of term '{name}' must be finite and not negative, got {weight}")
    return float(weight)


def _module(name: str, term: Any) -> nn.Module:
    """A term's module, built first if a config describes it."""
    if isinstance(term, Mapping) and "_target_" in term:
        from monai.bundle import ConfigParser

        term = ConfigParser({"term": dict(term)}).get_parsed_content("term")
    if not isinstance(term, nn.Module):
        raise TypeError(f"WeightedLosses: term '{name}' must be a torch module, got {type(term).__name__}")
    return term
