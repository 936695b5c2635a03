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
"""HyperTransMorphSPR."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bundles.spatially_varying_reg.scripts.generators import LowRankGenerator
from bundles.spatially_varying_reg.scripts.hyper import HyperTransMorphSPR
from bundles.spatially_varying_reg.scripts.network import TransMorphSPR
from common.networks import ConvUnit

_GENERATORS = ("low_rank", "full")
_SIZES = {2: (21, 34), 3: (17, 20, 13)}


def _small(**options: Any) -> dict[str, Any]:
    """Options of a small network that has everything."""
    small = {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "steps": 2, "step_channels": 4, "window_size": 2}
    return {**small, "drop_path": 0.0, **options}


def _network(generator: str = "low_rank", spatial_dims: int = 2, **options: Any) -> HyperTransMorphSPR:
    """A network whose weights do depend on the hyper-parameters, and that moves things."""
    network = HyperTransMorphSPR(spatial_dims, generator=generator, rank=2, code_channels=12, **_small(**options))
    for name, parameter in network.named_parameters():
        if "left" in name:
            nn.init.normal_(parameter, std=0.1)
        if "hyper_mlp" in name and name.endswith("weight"):
            nn.init.kaiming_normal_(parameter)
        if "head.conv" in name:
            nn.init.normal_(parameter, std=0.05)
    return network


def _pair(spatial_dims: int = 2, batch: int = 1) -> Tensor:
    return torch.rand(batch, 2, *_SIZES[spatial_dims])


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


class _Counted:
    """Counts how often a generator makes weights."""

    def __init__(self, network: HyperTransMorphSPR) -> None:
        self.calls = 0
        network.generator.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.calls += 1


# Parameters ---------------------------------------------------------------------------------------------------------


def _dead(embed_dim: int, depths: tuple[int, ...], steps: int, step_channels: int = 16, code: int = 96) -> int:
    """Published parameters that no output depends on: generators of biases that are not used, and of an unused head."""
    e = embed_dim
    decoder = 2 * (2 * e + e + e // 2)  # two units of each of three stages
    units = e // 2 + steps * e // 2  # of the pooled images and of each step
    late = steps * 2 * step_channels + 2 * (e // 2)  # last stage of each step, weight head
    qkv = sum(depth * 3 * e * 2**level for level, depth in enumerate(depths))
    head = 3 * step_channels * 27 + 3
    return code * (decoder + units + late + qkv + head)


@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({"embed_dim": 96, "depths": (4, 4, 5), "num_heads": (8, 8, 8), "steps": 7}, 1_611_830_520),
        ({"embed_dim": 24, "depths": (2, 2, 2), "num_heads": (4, 4, 4), "steps": 3}, 66_564_792),
    ],
)
def test_parameters_are_the_published_ones_without_the_dead(options: dict[str, Any], published: int) -> None:
    window = (5, 6, 7) if options["embed_dim"] == 96 else 2
    with torch.device("meta"):
        full = HyperTransMorphSPR(generator="full", window_size=window, norm="batch", **options)
        low_rank = HyperTransMorphSPR(window_size=window, norm="batch", **options)
    dead = _dead(options["embed_dim"], options["depths"], options["steps"])
    assert _count(full) == published - dead
    assert _count(low_rank) < 0.02 * published


def test_a_checkpoint_of_the_default_is_small() -> None:
    with torch.device("meta"):
        state = HyperTransMorphSPR(window_size=(5, 6, 7)).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) < 80e6


def test_state_dict_holds_no_weights_that_are_generated() -> None:
    low_rank, full = (HyperTransMorphSPR(2, generator=g, code_channels=12, **_small()) for g in _GENERATORS)
    assert not any("conv" in name for name in full.state_dict() if name.startswith("template."))
    plain = TransMorphSPR(2, **_small())
    assert {n.removeprefix("template.") for n in low_rank.state_dict() if n.startswith("template.")} == set(
        plain.state_dict()
    )


# Equivalence --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 3])
def test_low_rank_starts_as_the_plain_network(dims: int) -> None:
    plain = TransMorphSPR(dims, **_small()).eval()
    nn.init.normal_(plain.time_steps.steps[0].head.conv.weight, std=0.2)
    hyper = HyperTransMorphSPR(dims, **_small()).eval()
    hyper.template.load_state_dict(plain.state_dict())
    image = _pair(dims, 2)
    for alpha, w in ((1.0, 0.0), (1.2, 5.0)):
        hyper.condition(alpha=alpha, w=w)
        with torch.no_grad():
            got, expected = hyper.fields(image), plain.fields(image)
        for name, field in expected.items():
            torch.testing.assert_close(got[name], field)
        torch.testing.assert_close(got["alpha"], torch.full((2,), alpha))
        torch.testing.assert_close(got["w"], torch.full((2,), w))


@pytest.mark.parametrize("dims", [2, 3])
def test_full_gives_a_plain_network_whose_weights_it_makes(dims: int) -> None:
    """Maps are filled so that W z is a plain network's weight; the plain network gets the published order and shift."""
    options = _small(norm="batch", update="self_warped")
    plain, hyper = (
        TransMorphSPR(dims, **options).eval(),
        HyperTransMorphSPR(dims, generator="full", code_channels=12, alpha=1.05, w=3.0, **options).eval(),
    )
    state = {name: 0.2 * torch.randn_like(t) for name, t in plain.named_parameters()}
    plain.load_state_dict(state, strict=False)
    for unit in plain.modules():
        if isinstance(unit, ConvUnit):
            unit.activation_first = True
    plain.encoder.patch_embed.proj.padding = (1,) * dims
    code = hyper.hyper_mlp(torch.tensor([0.25, 0.6]))
    with torch.no_grad():
        for name, tensor in state.items():
            if name in hyper.generator.shapes:
                target = hyper.get_parameter(f"generator.maps.{name}")
                target.copy_(torch.outer(tensor.flatten(), code) / code.square().sum())
            else:
                hyper.get_parameter(f"template.{name}").copy_(tensor)
        image = _pair(dims)
        got, expected = hyper.fields(image), plain.fields(image)
    assert expected["ddf"].std() > 0.01
    for name, field in expected.items():
        torch.testing.assert_close(got[name], field, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("generator", _GENERATORS)
def test_weights_depend_on_both_numbers(generator: str) -> None:
    network, image = _network(generator).eval(), _pair()
    results = []
    for alpha, w in ((1.0, 1.0), (1.2, 1.0), (1.0, 4.0)):
        network.condition(alpha=alpha, w=w)
        with torch.no_grad():
            results.append(network(image))
    assert all((results[0] - other).abs().max() > 1e-3 for other in results[1:])


# Batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", _GENERATORS)
@pytest.mark.parametrize("dims", [2, 3])
def test_items_of_a_batch_are_as_one_by_one(generator: str, dims: int) -> None:
    network, image = _network(generator, dims, inverse=True, update="self_warped").eval(), _pair(dims, 4)
    alpha, w = [1.2, 1.0, 1.1, 1.0], [0.5, 2.0, 2.0, 2.0]
    network.condition(alpha=alpha, w=w)
    with torch.no_grad():
        together, field = network.fields(image), network(image)
        for k in range(4):
            network.condition(alpha=alpha[k], w=w[k])
            alone = network.fields(image[k : k + 1])
            assert set(alone) == set(together) == {"ddf", "velocity", "inverse_ddf", "weight_map", "alpha", "w"}
            for name, value in alone.items():
                torch.testing.assert_close(together[name][k : k + 1], value, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(field[k : k + 1], alone["ddf"], atol=1e-3, rtol=1e-3)


def test_equal_items_share_a_call() -> None:
    network, image = _network(), _pair(batch=4)
    calls = _Counted(network)
    network.condition(alpha=[1.1, 1.0, 1.1, 1.0], w=2.0)
    network.fields(image)
    assert calls.calls == 2
    network.condition(alpha=1.1, w=2.0)
    network.fields(image)
    assert calls.calls == 3


def test_training_draws_for_each_item() -> None:
    network, image = _network().train(), _pair(batch=3)
    with torch.no_grad():
        one, two = network.fields(image), network.fields(image)
    assert len(torch.cat([one["w"], two["w"]]).unique()) == 6
    assert one["w"].dtype == one["alpha"].dtype == torch.float32
    network.condition(w=1.0)
    with torch.no_grad():
        fixed = network.fields(image)
    assert (fixed["w"] == 1.0).all() and len(fixed["alpha"].unique()) == 3


def test_wrong_number_of_conditions_is_refused() -> None:
    network = _network(alpha=[1.0, 1.1])
    with pytest.raises(ValueError, match="alpha was given for 2 items, the batch has 3"):
        network(_pair(batch=3))


def test_gaussian_prior_is_called_sigma() -> None:
    network = HyperTransMorphSPR(2, prior="gaussian", sigma=0.525, w=1.0, **_small()).eval()
    with torch.no_grad():
        result = network.fields(_pair())
    torch.testing.assert_close(result["sigma"], torch.tensor([0.525]))
    assert "alpha" not in result
    with pytest.raises(ValueError, match="sigma and w, not alpha"):
        network.condition(alpha=1.1)


# Gradients ----------------------------------------------------------------------------------------------------------


def _gradients(network: HyperTransMorphSPR, image: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    result = network.fields(image)
    (result["ddf"].square().sum() + result["weight_map"].square().sum()).backward()
    missing = [name for name, p in network.named_parameters() if p.grad is None]
    assert not missing
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("generator", _GENERATORS)
def test_gradients_reach_every_parameter(generator: str) -> None:
    network, image = _network(generator, norm="batch"), _pair(batch=2)
    network.condition(alpha=[1.05, 1.15], w=[1.0, 4.0])
    zero = [name for name, grad in _gradients(network, image).items() if not grad.abs().max() > 0]
    assert not zero


def test_an_untrained_low_rank_network_learns_to_tell_conditions_apart() -> None:
    network, image = HyperTransMorphSPR(2, **_small()), _pair(batch=1).expand(2, -1, -1, -1)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    network.condition(alpha=[1.0, 1.2], w=[0.0, 5.0])
    target = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1)
    losses = []
    for _ in range(30):
        loss = (network.fields(image)["weight_map"] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.08 and losses[-1] < 0.01


@pytest.mark.parametrize("generator", _GENERATORS)
def test_recomputing_changes_no_gradient(generator: str) -> None:
    network, image = _network(generator, use_checkpoint=True), _pair(batch=3)
    network.condition(alpha=[1.0, 1.2, 1.0], w=[2.0, 3.0, 2.0])
    recomputed = _gradients(network, image)
    plain = HyperTransMorphSPR(2, generator=generator, rank=2, code_channels=12, **_small())
    plain.load_state_dict(network.state_dict())
    plain.condition(alpha=[1.0, 1.2, 1.0], w=[2.0, 3.0, 2.0])
    for name, grad in _gradients(plain, image).items():
        torch.testing.assert_close(recomputed[name], grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("generator", _GENERATORS)
def test_bfloat16(generator: str, device: torch.device) -> None:
    network, image = _network(generator, spatial_dims=3).to(device), _pair(3, 2).to(device)
    network.condition(alpha=1.1, w=2.0)
    expected = network.fields(image)
    with torch.autocast(device.type, torch.bfloat16):
        result = network.fields(image)
        loss = result["ddf"].square().mean() + result["weight_map"].mean()
    loss.backward()
    assert all(t.dtype == torch.float32 for t in result.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert (result["weight_map"] - expected["weight_map"]).abs().mean() < 0.05


# Weights that are kept ----------------------------------------------------------------------------------------------


def test_generated_weights_are_kept_in_evaluation() -> None:
    network, image = _network(alpha=1.1, w=2.0).eval(), _pair(batch=2)
    calls = _Counted(network)
    with torch.no_grad():
        first = network(image)
        torch.testing.assert_close(network.fields(image)["ddf"], first)
    with torch.inference_mode():
        network(image)
    assert calls.calls == 1
    network.condition(alpha=[1.1, 1.0], w=2.0)
    with torch.no_grad():
        network(image)
        network(image)
    assert calls.calls == 3


def _written(network: HyperTransMorphSPR) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)


def _stepped(network: HyperTransMorphSPR) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    network(_pair()).sum().backward()
    optimizer.step()


def _loaded(network: HyperTransMorphSPR) -> None:
    network.load_state_dict({k: v + 0.1 for k, v in network.state_dict().items()})


def _part_loaded(network: HyperTransMorphSPR) -> None:
    network.generator.load_state_dict({k: v + 0.1 for k, v in network.generator.state_dict().items()})


def _exchanged(network: HyperTransMorphSPR) -> None:
    network.load_state_dict({k: v + 0.1 for k, v in network.state_dict().items()}, assign=True)


def _replaced_data(network: HyperTransMorphSPR) -> None:
    for parameter in network.hyper_mlp.parameters():
        parameter.data = parameter.data + 0.1


@pytest.mark.parametrize(
    "change", [_written, _stepped, _loaded, _part_loaded, _exchanged, _replaced_data, lambda n: n.condition(alpha=1.0)]
)
@pytest.mark.parametrize("generator", _GENERATORS)
def test_kept_weights_are_never_stale(generator: str, change: Any) -> None:
    network, image = _network(generator, alpha=1.1, w=2.0).eval(), _pair()
    with torch.no_grad():
        before = network(image)
    change(network)
    with torch.no_grad():
        after = network(image)
        fresh = copy.deepcopy(network)(image)
    torch.testing.assert_close(after, fresh)
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    "change", [lambda n: n.train(), lambda n: n.eval(), lambda n: n.double().float(), lambda n: n.condition(w=1.0)]
)
def test_kept_weights_are_dropped(change: Any) -> None:
    network = _network(alpha=1.1, w=2.0).eval()
    with torch.no_grad():
        network(_pair())
    assert network._kept
    change(network)
    assert not network._kept


def test_evaluation_with_gradients() -> None:
    """Weights kept without a graph are not used where one is wanted; a frozen network may be differentiated too."""
    network, image = _network(alpha=1.1, w=2.0).eval(), _pair()
    with torch.inference_mode():
        expected = network(image)
    image.requires_grad_()
    out = network(image)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())
    assert network.hyper_mlp.layers[0].weight.grad is not None
    expected_grad, image.grad = image.grad, None
    calls = _Counted(network.requires_grad_(False))
    network(image).sum().backward()
    network(image).sum().backward()
    assert calls.calls == 0 and expected_grad is not None and image.grad is not None
    torch.testing.assert_close(image.grad, 2 * expected_grad, atol=1e-4, rtol=1e-3)


# As a module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", _GENERATORS)
def test_copies_and_state_dicts(generator: str) -> None:
    network, image = _network(generator, alpha=1.1, w=2.0).eval(), _pair()
    buffer = io.BytesIO()
    with torch.no_grad():
        expected = network(image)
        torch.save(network.state_dict(), buffer)
        buffer.seek(0)
        other = _network(generator, alpha=1.1, w=2.0).eval()
        other.load_state_dict(torch.load(buffer, weights_only=True))
        duplicate = copy.deepcopy(network)
        torch.testing.assert_close(other(image), expected)
        torch.testing.assert_close(duplicate(image), expected)
        _written(network)
        torch.testing.assert_close(duplicate(image), expected)


def test_switches_reach_the_network_inside() -> None:
    network = _network(alpha=1.1, w=2.0)
    network.weight_map, network.inverse = False, True
    assert set(network.fields(_pair())) == {"ddf", "inverse_ddf", "alpha", "w"}
    assert (network.weight_map, network.inverse) == (False, True)


def test_two_channels_and_no_weight_map() -> None:
    network = HyperTransMorphSPR(2, 2, alpha=1.1, w=2.0, weight_map=False, **_small())
    assert set(network.fields(torch.rand(1, 4, 19, 24))) == {"ddf", "alpha", "w"}


def test_running_statistics_are_kept() -> None:
    network = _network("full", norm="batch")
    buffers = {name: b.clone() for name, b in network.named_buffers() if b.is_floating_point()}
    network.fields(_pair())
    assert all((dict(network.named_buffers())[name] - b).abs().max() > 0 for name, b in buffers.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "hyper"}, "generator must be"),
        ({"prior": "uniform"}, "prior must be"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"w_range": (5.0, 0.0)}, "w_range must be two rising numbers"),
        ({"alpha": 0.5}, "alpha must be finite and at least 1"),
        ({"sigma": 0.5}, "alpha and w, not sigma"),
        ({"generator": "full", "patch_size": 2}, "patch_size of at least 4"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HyperTransMorphSPR(2, **_small(**options))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="embed_dims"):
        HyperTransMorphSPR(2, embed_dims=8)


def test_the_pair_is_checked() -> None:
    with pytest.raises(ValueError, match="2-D network"):
        _network()(torch.rand(1, 2, 8, 8, 8))


def test_it_warns_where_it_is_told() -> None:
    """The warning names the line that called ``condition``."""
    with pytest.warns(UserWarning, match="outside the trained range") as caught:
        _network().condition(w=6.0)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _network(w_range=(0.0, 6.0)).condition(w=6.0)


# Cost ---------------------------------------------------------------------------------------------------------------


def test_a_training_step_on_brains_takes_less_than_8_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    """By count, at 160 x 192 x 224 voxels: what the optimiser keeps, what the backward pass is left, and one time step
    computed again. Nothing is allocated."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device

    def kept(use_checkpoint: bool) -> tuple[int, int]:
        with torch.device("meta"):
            network = HyperTransMorphSPR(window_size=(5, 6, 7), use_checkpoint=use_checkpoint)
            image = torch.empty(1, 2, 160, 192, 224)
        tensors: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: tensors.setdefault(t.untyped_storage()._cdata, t), lambda t: t
        ):
            network.fields(image)
        own = {p.untyped_storage()._cdata for p in network.parameters()}
        activations = sum(t.untyped_storage().nbytes() for key, t in tensors.items() if key not in own)
        return activations, 4 * _count(network)

    recomputed, weights = kept(True)
    everything, _ = kept(False)
    step = (everything - recomputed) / 7  # seven equal steps are most of what is computed again
    with_amsgrad = 5 * weights  # weights, gradients, three moments
    assert recomputed < 2.3 * 2**30 < everything
    assert recomputed + step + with_amsgrad < 4 * 2**30  # the other half is for the loss and for what comes and goes


def test_making_weights_is_cheap() -> None:
    """By count: multiplications of the default, against one for each weight and voxel of a 64-voxel pair."""
    with torch.device("meta"):
        network = HyperTransMorphSPR(window_size=2)
    generator = network.generator
    assert isinstance(generator, LowRankGenerator)
    made = sum(
        generator.left.get_parameter(layer).numel() * generator.right.get_parameter(layer).shape[1]
        for layer in generator.ranks
    )
    assert made < 0.02 * 33.96e9 / 2  # the specification counts 33.96 GFLOP for a pair of that size
