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
"""Weights of a network made from a code: a linear map to every weight, or low-rank changes of shared weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import prod

import torch
from monai.networks.nets.swin_unetr import PatchMergingV2
from torch import Tensor, nn

__all__ = ["FullGenerator", "HyperMLP", "LowRankGenerator", "modulated_shapes"]

Shapes = Mapping[str, tuple[int, ...]]

# Of the directions of a low-rank change. The optimiser moves ``left`` as slowly as any weight; what it moves counts by
# this. With 3 a small network of two dimensions learned a little faster than with 1 or 0.3.
_SPREAD = 3.0


def modulated_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of ``network`` that depend on the hyper-parameters.

    As published these are the weights and biases of convolutions and linear layers, but not of patch mergings, norms
    and tables of position biases.
    """
    merging = {module.reduction for module in network.modules() if isinstance(module, PatchMergingV2)}
    kinds = (nn.Conv2d, nn.Conv3d, nn.Linear)
    return {
        f"{path}.{name}": tuple(parameter.shape)
        for path, module in network.named_modules()
        if isinstance(module, kinds) and module not in merging
        for name, parameter in module.named_parameters(recurse=False)
    }


class HyperMLP(nn.Module):
    """Hyper-parameters to a code: linear layers, a ReLU after each, the last one too.

    Args:
        inputs: number of hyper-parameters.
        channels: of the code and between.
        layers: number of layers.
    """

    def __init__(self, inputs: int = 2, channels: int = 96, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels if k else inputs, channels) for k in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., channels)."""
        for layer in self.layers:
            x = layer(x).relu()
        return x


def _tree(parameters: Iterable[tuple[str, Tensor]]) -> nn.Module:
    """A module that holds parameters under dotted names."""
    root = nn.Module()
    for name, tensor in parameters:
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, nn.Parameter(tensor))
    return root


class FullGenerator(nn.Module):
    """Every weight is a linear map of the code, without a bias, as published.

    Args:
        shapes: of the weights, by name.
        code_channels: length K of the code.
        small: names of weights that are to be near zero, whose maps start from N(0, 1e-5).

    Attributes:
        relative: False, as what ``forward`` gives are weights, not changes of weights.
    """

    relative = False

    def __init__(self, shapes: Shapes, code_channels: int, small: Collection[str] = ()) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.maps = _tree((name, self._initial(prod(s), code_channels, name in small)) for name, s in shapes.items())

    @staticmethod
    def _initial(rows: int, columns: int, small: bool) -> Tensor:
        if small:
            return torch.empty(rows, columns).normal_(std=1e-5)
        return torch.empty(rows, columns).uniform_(-(columns**-0.5), columns**-0.5)  # as nn.Linear

    def forward(self, code: Tensor) -> dict[str, Tensor]:
        """Weights by name, of the code (K,)."""
        return {name: (self.maps.get_parameter(name) @ code).view(shape) for name, shape in self.shapes.items()}


class LowRankGenerator(nn.Module):
    """Changes of a layer's weights W (out, in) within a few directions, each as strong as the code says.

    ``change = left @ diag(coefficients @ code) @ right``, with ``left`` (out, r) and ``right`` (r, in): a sum of r
    matrices of rank one. A bias is one more column of W, the numbers of a convolution kernel are part of ``in``.
    ``left`` starts at zero, so that nothing changes before training.

    Args:
        shapes: of the weights, by name; a bias belongs to the weight of its layer.
        code_channels: length K of the code.
        rank: r; of a layer with fewer outputs or inputs, their number.

    Attributes:
        relative: True, as what ``forward`` gives is to be added to weights.

    Raises:
        ValueError: for a rank below 1.
    """

    relative = True

    def __init__(self, shapes: Shapes, code_channels: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.shapes = dict(shapes)
        weights = {name.rpartition(".")[0]: s for name, s in shapes.items() if name.endswith(".weight")}
        columns = {layer: prod(s[1:]) + (f"{layer}.bias" in shapes) for layer, s in weights.items()}
        self.ranks = {layer: min(rank, s[0], columns[layer]) for layer, s in weights.items()}
        self.left = _tree((layer, torch.zeros(weights[layer][0], r)) for layer, r in self.ranks.items())
        self.right = _tree(
            (layer, torch.empty(r, columns[layer]).normal_(std=_SPREAD * r**-0.5)) for layer, r in self.ranks.items()
        )
        self.coefficients = nn.Linear(code_channels, sum(self.ranks.values()), bias=False)
        nn.init.kaiming_uniform_(self.coefficients.weight, nonlinearity="relu")

    def forward(self, code: Tensor) -> dict[str, Tensor]:
        """Changes of weights by name, of the code (K,)."""
        strengths = self.coefficients(code).split(list(self.ranks.values()))
        changes: dict[str, Tensor] = {}
        for layer, strength in zip(self.ranks, strengths, strict=True):
            scaled, right = self.left.get_parameter(layer) * strength, self.right.get_parameter(layer)
            shape = self.shapes[f"{layer}.weight"]
            changes[f"{layer}.weight"] = (scaled @ right[:, : prod(shape[1:])]).view(shape)
            if f"{layer}.bias" in self.shapes:
                changes[f"{layer}.bias"] = scaled @ right[:, -1]
        return changes
