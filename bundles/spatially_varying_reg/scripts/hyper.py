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
"""HyperTransMorphSPR: TransMorphSPR whose weights depend on the strengths of its regularisation.

Source: Chen et al., arXiv 2412.17982 (Medical Image Analysis 2026).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.utils import convert_to_tensor
from torch import Tensor, nn
from torch.func import functional_call

from common.losses.checks import check_choice
from common.networks import ConvUnit, FlowHead, RegistrationNetwork, split_pair
from common.spatial.exporting import exporting

from .conditioning import Conditioning
from .generators import FullGenerator, HyperMLP, LowRankGenerator, modulated_shapes
from .network import TransMorphSPR

__all__ = ["HyperTransMorphSPR"]

_SMALLEST_PATCH = 4  # with less, a padded patch embedding gives one patch more


class _Call(nn.Module):
    """A module whose forward is a method of another one, as ``functional_call`` runs nothing but forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, image: Tensor) -> Any:
        """What the method gives for ``image``."""
        return getattr(self.module, method)(image)


def _as_published(template: TransMorphSPR) -> None:
    """Two things in which the published hyper network differs from the plain one.

    The norms stand behind the activations, and the patch embedding is padded, so patches lie one voxel further out.
    """
    for module in template.modules():
        if isinstance(module, ConvUnit):
            module.activation_first = True
    projection = template.encoder.get_submodule("patch_embed.proj")
    projection.padding = (1,) * template.spatial_dims  # type: ignore[assignment]


class HyperTransMorphSPR(RegistrationNetwork):
    """One network for all strengths of the hyperprior (alpha, or sigma) and of the smoothness (w).

    A small MLP turns the two numbers into a code, and a generator turns the code into weights of ``TransMorphSPR``:

    - "low_rank": weights W of the plain network plus a change of low rank for each layer. Before training the change
      is zero, so the network starts as a plain one; ``template.load_state_dict`` takes a trained plain network.
    - "full": every weight is a linear map of the code, as published, and so are the order of activation and norm and
      the patch embedding's padding. With the published sizes it has 1.6 billion parameters.

    Norms, tables of position biases and patch mergings do not depend on the code.

    The network sees images only, so the numbers are its state: see :meth:`condition`. What is left open is drawn
    uniformly over its range for each item in training, and is mid-range in evaluation. ``fields`` gives, beside what
    the plain network does, the numbers that were used, "alpha" (or "sigma") and "w", (B,), for the losses.
    Items of a batch with equal numbers are run together, others one after another.

    In evaluation, where no gradient is asked for, generated weights are kept as long as the numbers and all parameters
    stay the same.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of one image.
        generator: "low_rank" or "full".
        rank: of the changes of a layer, for "low_rank".
        code_channels: length of the code and width of the MLP.
        prior: "beta", whose strength is alpha, or "gaussian", whose strength is sigma.
        alpha_range: trained range of alpha.
        sigma_range: trained range of sigma.
        w_range: trained range of w.
        alpha: as for :meth:`condition`.
        sigma: as for :meth:`condition`.
        w: as for :meth:`condition`.
        options: of ``TransMorphSPR``.

    Raises:
        ValueError: for an unknown choice, a range or a value that cannot be, or a patch too small for "full".
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        channels: int = 1,
        *,
        generator: str = "low_rank",
        rank: int = 16,
        code_channels: int = 96,
        prior: str = "beta",
        alpha_range: Sequence[float] = (1.0, 1.2),
        sigma_range: Sequence[float] = (0.0, 0.6),
        w_range: Sequence[float] = (0.0, 5.0),
        alpha: float | Sequence[float] | None = None,
        sigma: float | Sequence[float] | None = None,
        w: float | Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(spatial_dims)
        check_choice("HyperTransMorphSPR", "generator", generator, ("low_rank", "full"))
        check_choice("HyperTransMorphSPR", "prior", prior, ("beta", "gaussian"))
        strength = {"alpha": alpha_range} if prior == "beta" else {"sigma": sigma_range}
        self.conditioning = Conditioning(**strength, w=w_range)
        self.template = TransMorphSPR(spatial_dims, channels, **options)
        self.hyper_mlp = HyperMLP(len(self.conditioning.names), code_channels)
        shapes = modulated_shapes(self.template)
        if generator == "full":
            self.generator: FullGenerator | LowRankGenerator = self._full(shapes, code_channels)
        else:
            # The published start leaves the code nearly the same for all inputs; this one does not.
            for layer in self.hyper_mlp.layers:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            self.generator = LowRankGenerator(shapes, code_channels, rank)
        self._kept: dict[tuple[float, ...], dict[str, Tensor]] = {}
        self._kept_for: tuple[Any, ...] = ()
        self.condition(alpha=alpha, sigma=sigma, w=w)

    def _full(self, shapes: dict[str, tuple[int, ...]], code_channels: int) -> FullGenerator:
        """The generator of all weights, which the template then has no more of its own."""
        patch = shapes["encoder.patch_embed.proj.weight"][-1]
        if patch < _SMALLEST_PATCH:
            raise ValueError(f"generator 'full' needs a patch_size of at least {_SMALLEST_PATCH}, got {patch}")
        _as_published(self.template)
        heads = [path for path, module in self.template.named_modules() if isinstance(module, FlowHead)]
        for name in shapes:
            path, _, leaf = name.rpartition(".")
            self.template.get_submodule(path).register_parameter(leaf, None)
        small = [name for name in shapes if name.startswith(tuple(f"{head}." for head in heads))]
        return FullGenerator(shapes, code_channels, small)

    @property
    def weight_map(self) -> bool:
        """Have ``fields`` give the weight map; may be changed."""
        return self.template.weight_map

    @weight_map.setter
    def weight_map(self, value: bool) -> None:
        self.template.weight_map = value

    @property
    def inverse(self) -> bool:
        """Have ``fields`` give the inverse field; may be changed."""
        return self.template.inverse

    @inverse.setter
    def inverse(self, value: bool) -> None:
        self.template.inverse = value

    def condition(
        self,
        *,
        alpha: float | Sequence[float] | Tensor | None = None,
        sigma: float | Sequence[float] | Tensor | None = None,
        w: float | Sequence[float] | Tensor | None = None,
    ) -> None:
        """Say the hyper-parameters from now on; those that are None are left open.

        Args:
            alpha: strength of the Beta hyperprior, at least 1: one number or one for each item, (B,).
            sigma: strength of the Gaussian hyperprior, not negative, likewise.
            w: strength of the smoothness, not negative, likewise.

        Raises:
            ValueError: for values that are not finite or too low, or the strength of the other hyperprior.
        """
        self.conditioning.set(alpha=alpha, sigma=sigma, w=w)
        self._kept = {}

    def forward(self, image: Tensor) -> Tensor:
        """The field alone, (B, d, *S), of the pair ``image`` (B, 2C, *S)."""
        ddf: Tensor = self._by_condition("forward", image)["ddf"]
        return ddf

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Fields of the pair ``image`` (B, 2C, *S), and its hyper-parameters; see the class."""
        return self._by_condition("fields", image)

    def _by_condition(self, method: str, image: Tensor) -> dict[str, Any]:
        """Run a method of the template on the items of each condition, and put the results in order."""
        split_pair(image, self.spatial_dims)
        image = convert_to_tensor(image, track_meta=False)
        values = self.conditioning.values(len(image), sample=self.training)
        if exporting():
            return self._recorded(method, image, values)
        rows, which = values.unique(dim=0, return_inverse=True)
        weights = self._weights(rows)
        if len(rows) == 1:
            result = self._run(method, image, weights[0])
        else:
            items = [(which == k).nonzero().flatten().to(image.device) for k in range(len(rows))]
            parts = [self._run(method, image[i], made) for i, made in zip(items, weights, strict=True)]
            order = torch.cat(items).argsort()
            result = {key: torch.cat([part[key] for part in parts])[order] for key in parts[0]}
        return self._with_conditions(result, values)

    def _recorded(self, method: str, image: Tensor, values: Tensor) -> dict[str, Any]:
        """Of an exported network: the numbers of today become part of the program, and are those of all items."""
        if self.training or not self.conditioning.shared:
            raise ValueError("only in evaluation, and with one condition for all items, can the network be exported")
        return self._with_conditions(self._run(method, image, self._generate(values[0])), values)

    def _with_conditions(self, result: dict[str, Tensor], values: Tensor) -> dict[str, Any]:
        used = values.to(next(iter(result.values())).device).unbind(1)
        return {**result, **dict(zip(self.conditioning.names, used, strict=True))}

    def _run(self, method: str, image: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        inside = {f"module.{name}": tensor for name, tensor in weights.items()}
        result = functional_call(_Call(self.template), inside, (method, image))
        return result if isinstance(result, dict) else {"ddf": result}

    def _generate(self, row: Tensor) -> dict[str, Tensor]:
        """Weights of the template for hyper-parameters (2,), in full precision."""
        device = next(self.hyper_mlp.parameters()).device
        with torch.autocast(device.type, enabled=False):
            made = self.generator(self.hyper_mlp(self.conditioning.normalised(row).to(device)))
            if self.generator.relative:
                made = {name: change.add_(self.template.get_parameter(name)) for name, change in made.items()}
        return made

    def _weights(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Weights of the template for each of some hyper-parameters (n, 2)."""
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or wanted:
            return [self._generate(row) for row in rows]
        state = tuple(map(_stamp, self.parameters()))
        if state != self._kept_for:
            self._kept, self._kept_for = {}, state
        # Normal tensors, even within torch.inference_mode: they may be used outside later.
        with torch.inference_mode(False), torch.no_grad():
            self._kept = {key: self._kept.get(key) or self._generate(row) for key, row in _keyed(rows)}
        return list(self._kept.values())

    def train(self, mode: bool = True) -> HyperTransMorphSPR:
        """Switch to training or evaluation; weights that were kept are dropped."""
        self._kept = {}
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> HyperTransMorphSPR:
        self._kept = {}
        super()._apply(fn, recurse)
        return self

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of any module; weights that were kept are dropped."""
        self._kept = {}
        return super().load_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles come without weights that can be made again."""
        return {**self.__dict__, "_kept": {}, "_kept_for": ()}


def _keyed(rows: Tensor) -> list[tuple[tuple[float, ...], Tensor]]:
    return [(tuple(row.tolist()), row) for row in rows]


def _stamp(parameter: Tensor) -> tuple[int, int, int]:
    """What changes when a parameter is replaced, moved or written to."""
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), version
