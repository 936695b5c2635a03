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
"""The network against the same one made of ordinary layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bundles.similarity_learning.scripts import encoder as module
from bundles.similarity_learning.scripts.encoder import FeatureEncoder, fold, replicate

SIZES = [(13, 10), (1, 5), (7, 12, 10), (1, 3, 2)]


def random_encoder(spatial_dims: int, **options: object) -> FeatureEncoder:
    """With weights of about 1, so that features of either sign occur."""
    network = FeatureEncoder(spatial_dims, **options)  # type: ignore[arg-type]
    for conv in (*network.convolutions, network.aggregation):
        conv.reset_parameters()
    return network


def by_layers(network: FeatureEncoder, image: Tensor) -> Tensor:
    """The same by PyTorch's own operations and derivatives."""
    x = image
    for conv in network.convolutions:
        x = F.leaky_relu(conv(F.pad(x, (1,) * (2 * (x.ndim - 2)), mode="replicate")), network.slope)
    return network.aggregation(x)


def saved_bytes(function: object, *arguments: Tensor) -> tuple[Tensor, int]:
    """A function's result, and what is kept for its backward pass, each piece of memory counted once."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return function(*arguments), sum(kept.values())  # type: ignore[operator]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("for_image", [False, True])
def test_values_and_gradients_are_those_of_ordinary_layers(
    size: tuple[int, ...], batch: int, learns: bool, for_image: bool, device: torch.device
) -> None:
    network = random_encoder(len(size)).to(device).requires_grad_(learns)
    image = torch.randn(batch, 1, *size, device=device).requires_grad_(for_image)
    wanted = [*([image] if for_image else []), *(network.parameters() if learns else [])]
    expected, found = by_layers(network, image), network(image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.requires_grad == bool(wanted)
    if wanted:
        weights = torch.randn_like(expected)
        gradients = torch.autograd.grad(found, wanted, weights)
        for gradient, other in zip(gradients, torch.autograd.grad(expected, wanted, weights), strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5 * float(1 + other.abs().max()), rtol=0)
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("size", [(4, 3), (3, 4, 2)])
def test_gradients_are_numerical_derivatives(size: tuple[int, ...]) -> None:
    network = random_encoder(len(size), channels=(2, 3)).double()
    image = torch.randn(2, 1, *size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(network, (image,), fast_mode=True)
    names = [name for name, _ in network.named_parameters()]

    def of_weights(*weights: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (image.detach(),))
        return result

    weights = [p.detach().clone().requires_grad_() for p in network.parameters()]
    assert torch.autograd.gradcheck(of_weights, weights, fast_mode=True)


@pytest.mark.parametrize("size", SIZES)
def test_it_begins_as_the_identity(size: tuple[int, ...]) -> None:
    network, image = FeatureEncoder(len(size)), torch.rand(2, 1, *size)
    torch.testing.assert_close(network(image), image, atol=1e-5, rtol=0)
    # Each convolution turns a negative number into a fifth of it.
    torch.testing.assert_close(network(-image), -(0.2**3) * image, atol=1e-5, rtol=0)
    assert sum(p.numel() for p in FeatureEncoder(3).parameters()) == 2728
    for conv in network.convolutions:
        # No two features are equal, or they would learn the same.
        assert len({round(w, 12) for w in conv.weight.flatten().tolist()}) > 0.9 * conv.weight.numel()


def test_frozen_it_keeps_a_byte_a_feature() -> None:
    image = torch.rand(2, 1, 12, 10, 14).requires_grad_()
    network = FeatureEncoder(3)
    weights = 4 * 2728
    _, learning = saved_bytes(network, image)
    network.requires_grad_(False)
    _, frozen = saved_bytes(network, image)
    _, ordinary = saved_bytes(lambda x: by_layers(network, x), image)
    assert frozen <= image.numel() * 20 + weights
    assert learning <= image.numel() * 4 * 21 + weights
    assert ordinary > 5 * frozen
    _, nothing = saved_bytes(network, image.detach())
    assert nothing == 0


def test_autocast_rounds_features_and_nothing_else(device: torch.device) -> None:
    network = random_encoder(3).to(device)
    image = torch.rand(2, 1, 9, 10, 11, device=device).requires_grad_()
    wanted = [image, *network.parameters()]
    exact = network(image)
    slopes = torch.autograd.grad(exact.sum(), wanted)
    with torch.autocast(device.type, torch.bfloat16):
        rounded = network(image)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.03 * exact.abs().max()
    for gradient, expected in zip(torch.autograd.grad(rounded.sum(), wanted), slopes, strict=True):
        assert gradient.dtype == torch.float32
        # Signs that change by rounding make single numbers differ more.
        assert (gradient - expected).norm() < 0.05 * expected.norm()


def test_autocast_does_not_reach_into_the_backward_pass(device: torch.device) -> None:
    network = random_encoder(3).to(device)
    image = torch.rand(2, 1, 6, 7, 5, device=device)
    wanted = list(network.parameters())
    expected = torch.autograd.grad(network(image).sum(), wanted)
    result = network(image).sum()
    with torch.autocast(device.type, torch.bfloat16):
        found = torch.autograd.grad(result, wanted)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("depth", [1, 2, 7, 23])
@pytest.mark.parametrize("thickness", [1, 2, 3, 5])
def test_large_volumes_are_computed_in_slabs(depth: int, thickness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = random_encoder(3).requires_grad_(False), torch.rand(2, 1, depth, 4, 5).requires_grad_()
    expected, weights = by_layers(network, image), torch.randn(2, 1, depth, 4, 5)
    (slope,) = torch.autograd.grad(expected, image, weights)
    # A slab of so many planes, and the first convolution plane by plane.
    slabs = [module._Slab(k, min(k + thickness, depth), depth) for k in range(0, depth, thickness)]
    monkeypatch.setattr(module, "_slabs", lambda *_, **__: slabs)
    monkeypatch.setattr(module, "_MAPPED", 0)
    found = network(image)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, image, weights)[0], slope)


def test_slabs_cover_a_volume_once_and_stay_small() -> None:
    weights = [*FeatureEncoder(3).parameters()]
    for size in (160, 161, 192, 224):
        image = torch.empty(2, 1, size, 160, 128)
        slabs = module._slabs(image, weights, whole=False)
        assert [k for slab in slabs for k in range(slab.start, slab.stop)] == list(range(size))
        thickness = [slab.stop - slab.start for slab in slabs]
        assert 6 <= min(thickness) <= max(thickness)
        assert (max(thickness) + 6) * 160 * 128 * 2 * 8 * 4 <= 32 * 2**20
        assert len(module._slabs(image, weights, whole=True)) == 1


@pytest.mark.parametrize("size", [(5, 4), (1, 3), (4, 1, 3)])
@pytest.mark.parametrize("width", [1, 3])
def test_folding_reverses_replication(size: tuple[int, ...], width: int) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    padded = replicate(x, width)
    y = torch.randn_like(padded)
    torch.testing.assert_close((padded * y).sum(), (x * fold(y.clone(), width)).sum())


def test_a_slope_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="slope must be above 0 and at most 1, got 0"):
        FeatureEncoder(2, slope=0.0)
