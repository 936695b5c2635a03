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

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.networks import (
    PyramidDecoder,
    SwinEncoder,
    TimeSteps,
    TransMorphTVF,
    VoxelMorphEncoder,
    build_encoder,
    encode_pair,
)
from common.spatial import compose, integrate, jacobian_determinant, warp

_TINY: dict[str, dict[str, Any]] = {
    "swin": {"embed_dim": 8, "depths": (1, 2), "num_heads": (2, 2), "window_size": 2, "drop_path": 0.0},
    "vfa": {"start_channels": 2, "max_channels": 8, "downsamples": 3},
    "voxelmorph": {"channels": (8, 8, 8)},
}


def _network(name: str = "swin", dims: int = 2, patch_size: int = 4, **options: Any) -> TransMorphTVF:
    patch = {"patch_size": patch_size} if name == "swin" else {}
    return TransMorphTVF(build_encoder(name, dims, **_TINY[name], **patch), **{"steps": 3, **options})


class _Fixed(nn.Module):
    """A step with a given answer, which keeps what it was shown."""

    def __init__(self, field: Tensor) -> None:
        super().__init__()
        self.field = field

    def forward(self, moved: Tensor, fixed: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        self.moved = moved
        return self.field, torch.ones_like(fixed)


def _smooth(seed: int, amplitude: float = 2.0) -> Tensor:
    coarse = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * amplitude
    return nn.functional.interpolate(coarse, size=(24, 24), mode="bicubic", align_corners=True)


def _run(
    update: str, diffeomorphic: bool, amplitude: float = 2.0, inverse: bool = False
) -> tuple[Any, list[Tensor], TimeSteps, Tensor]:
    fields = [_smooth(seed, amplitude) for seed in range(3)]
    loop = TimeSteps(
        2,
        2,
        4,
        steps=3,
        step_channels=4,
        update=update,
        diffeomorphic=diffeomorphic,
        integration_steps=7,
        norm="instance",
        padding="border",
        use_checkpoint=False,
    )
    loop.steps = nn.ModuleList(_Fixed(field) for field in fields)
    moving = torch.rand(1, 1, 24, 24)
    return loop(moving, torch.rand(1, 1, 24, 24), torch.rand(1, 4, 12, 12), inverse), fields, loop, moving


def test_parameters_of_the_published_body() -> None:
    network = TransMorphTVF(SwinEncoder(window_size=(5, 6, 7)), steps=7)
    assert sum(p.numel() for p in network.parameters()) == 17_573_565


@pytest.mark.parametrize("diffeomorphic", [False, True])
def test_composition_applies_the_last_step_first(diffeomorphic: bool) -> None:
    out, (a, b, c), loop, moving = _run("composition", diffeomorphic)
    move = integrate if diffeomorphic else (lambda field: field)
    expected = compose(compose(move(a), move(b)), move(c))
    torch.testing.assert_close(out.ddf, expected)
    assert out.velocity is None
    # Each step sees the moving image under all the steps before it.
    torch.testing.assert_close(loop.steps[2].moved, warp(moving, compose(move(a), move(b))))
    torch.testing.assert_close(out.features, torch.full((1, 1, 24, 24), 3.0))


def test_added_velocities_are_integrated_once() -> None:
    out, (a, b, c), loop, moving = _run("addition", True)
    torch.testing.assert_close(out.velocity, a + b + c)
    torch.testing.assert_close(out.ddf, integrate(a + b + c))
    torch.testing.assert_close(loop.steps[1].moved, warp(moving, integrate(a)))


def test_added_displacements_are_not_integrated() -> None:
    out, (a, b, c), _, _ = _run("addition", False)
    torch.testing.assert_close(out.ddf, a + b + c)
    assert out.velocity is None


def test_self_warped_steps_are_a_displacement_in_the_loop_and_a_velocity_at_the_end() -> None:
    out, (a, b, c), loop, moving = _run("self_warped", True)
    total = warp(a, a) + warp(b, b) + warp(c, c)
    torch.testing.assert_close(out.velocity, total)
    torch.testing.assert_close(out.ddf, integrate(total))
    torch.testing.assert_close(loop.steps[1].moved, warp(moving, warp(a, a)))
    torch.testing.assert_close(_run("self_warped", False)[0].ddf, total)


@pytest.mark.parametrize("update", ["composition", "addition"])
def test_diffeomorphic_updates_do_not_fold(update: str) -> None:
    folded = jacobian_determinant(_run(update, False, 3.5)[0].ddf)[..., 3:-3, 3:-3].min()
    mended = jacobian_determinant(_run(update, True, 3.5)[0].ddf)[..., 3:-3, 3:-3].min()
    assert folded < 0 < mended


@pytest.mark.parametrize("update", TimeSteps.updates)
def test_velocities_run_backwards_give_the_inverse(update: str) -> None:
    out = _run(update, True, 1.0, inverse=True)[0]
    inside = (..., slice(7, -7), slice(7, -7))  # from farther out one comes from beyond the border
    assert out.ddf[inside].abs().max() > 2
    for outer, inner in ((out.ddf, out.inverse_ddf), (out.inverse_ddf, out.ddf)):
        assert compose(outer, inner)[inside].abs().max() < 0.1


def test_the_inverse_of_composed_flows_undoes_the_last_step_last() -> None:
    out, (a, b, c), _, _ = _run("composition", True, inverse=True)
    torch.testing.assert_close(out.inverse_ddf, compose(integrate(-c), compose(integrate(-b), integrate(-a))))
    assert _run("composition", True)[0].inverse_ddf is None


def test_displacements_have_no_inverse_to_give() -> None:
    with pytest.raises(ValueError, match="inverse needs diffeomorphic=True"):
        _run("composition", False, inverse=True)


def test_the_inverse_is_given_when_asked_for_and_in_image_voxels() -> None:
    network = _network(inverse=True, update="addition")
    for step in network.time_steps.steps:
        nn.init.constant_(step.head.conv.weight, 0.0)
        nn.init.constant_(step.head.conv.bias, 0.5)
    image = torch.rand(1, 2, 33, 30)
    torch.testing.assert_close(network.fields(image)["inverse_ddf"], torch.full((1, 2, 33, 30), -3.0))
    torch.testing.assert_close(network(image), torch.full((1, 2, 33, 30), 3.0))
    network.inverse = False
    assert "inverse_ddf" not in network.fields(image)


@pytest.mark.parametrize("name", sorted(_TINY))
@pytest.mark.parametrize("size", [(32, 48), (37, 21), (16, 18, 33)])
def test_any_encoder_and_any_size_run_and_learn(name: str, size: Sequence[int], device: torch.device) -> None:
    network = _network(name, len(size)).to(device)
    image = torch.rand(2, 2, *size, device=device)
    ddf = network(image)
    assert ddf.shape == (2, len(size), *size)
    assert ddf.dtype == torch.float32
    assert ddf.abs().max() < 0.05  # near the identity before training
    (ddf**2).sum().backward()
    # Biases before an instance norm do not matter, and get no gradient but rounding.
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize(("patch_size", "image_skips"), [(2, 0), (4, 1), (8, 2)])
def test_the_decoder_ends_at_stride_two(patch_size: int, image_skips: int) -> None:
    encoder = build_encoder("swin", 2, patch_size=patch_size, **_TINY["swin"])
    decoder = PyramidDecoder(encoder, 2, "instance")
    assert len(decoder.image_units) == image_skips
    pair = torch.rand(1, 2, 32, 48)
    out = decoder(pair, encode_pair(encoder, pair))
    assert out.shape == (1, decoder.out_channels, 16, 24)


def test_no_downsampling_and_one_factor_an_axis() -> None:
    image = torch.rand(1, 2, 24, 20, 5)
    for downsample, grid in ((1, (24, 24, 8)), ((2, 2, 1), (16, 16, 8)), (2, (16, 16, 8))):
        out = _network(dims=3, downsample=downsample).fields(image)
        assert out["ddf"].shape == (1, 3, 24, 20, 5)
        assert out["features"].shape == (1, 16, *grid)


def test_velocity_is_in_image_voxels() -> None:
    network = _network(update="addition")
    for step in network.time_steps.steps:
        nn.init.constant_(step.head.conv.weight, 0.0)
        nn.init.constant_(step.head.conv.bias, 0.5)
    out = network.fields(torch.rand(1, 2, 32, 32))
    # Three steps of half a voxel of the half-size grid are three voxels of the image.
    torch.testing.assert_close(out["velocity"], torch.full((1, 2, 32, 32), 3.0))
    torch.testing.assert_close(out["ddf"], torch.full((1, 2, 32, 32), 3.0))


def test_fields_stay_float32_under_autocast(device: torch.device) -> None:
    network = _network(update="addition").to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = network.fields(torch.rand(1, 2, 32, 32, device=device).to(torch.bfloat16))
    assert out["ddf"].dtype == out["velocity"].dtype == torch.float32


def test_checkpointing_changes_nothing() -> None:
    plain, frugal = _network(), _network(use_checkpoint=True)
    frugal.load_state_dict(plain.state_dict())
    image = torch.rand(1, 2, 32, 32)
    for network in (plain, frugal):
        (network(image) ** 2).sum().backward()
    for a, b in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_checkpoint_serves_every_size(tmp_path: Any) -> None:
    source, target = _network(), _network()
    source(torch.rand(1, 2, 64, 32))
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target(torch.rand(1, 2, 23, 40))
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    image = torch.rand(1, 2, 30, 30)
    with torch.no_grad():
        torch.testing.assert_close(source.eval()(image), target.eval()(image))


def test_multichannel_images() -> None:
    network = TransMorphTVF(VoxelMorphEncoder(2, in_channels=6), channels=3, steps=2)
    assert network(torch.rand(1, 6, 32, 32)).shape == (1, 2, 32, 32)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'sum'"):
        _network(update="sum")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _network(steps=0)
    with pytest.raises(ValueError, match="norm must be"):
        _network(norm="group")


@pytest.mark.parametrize(
    ("update", "diffeomorphic"), [("composition", True), ("addition", True), ("composition", False)]
)
def test_it_learns_to_register_a_pair(update: str, diffeomorphic: bool, blobs: tuple[Tensor, Tensor]) -> None:
    network = _network("voxelmorph", update=update, diffeomorphic=diffeomorphic)
    moving, fixed = blobs
    image = torch.cat((moving, fixed), dim=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    before = ((moving - fixed) ** 2).mean().item()
    for _ in range(40):
        optimizer.zero_grad()
        ddf = network(image)
        (((warp(moving, ddf) - fixed) ** 2).mean() + 1e-4 * (ddf.diff(dim=2) ** 2).mean()).backward()
        optimizer.step()
    ddf = network(image)
    assert ((warp(moving, ddf) - fixed) ** 2).mean().item() < 0.2 * before
    # The blob lies at (12, 18) in the moving image and at (16, 15) in the fixed one.
    torch.testing.assert_close(ddf[0, :, 16, 15], torch.tensor([-4.0, 3.0]), atol=1.5, rtol=0)
