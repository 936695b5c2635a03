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

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bundles.dual_stream_pyramid.scripts.inverse_consistent import InverseConsistentDecoder, at_feature_centres
from common.networks import DualStreamEncoder, fixed_point, slabs
from common.spatial import compose, digital_jacobian_determinants, warp

SMALL: dict[str, Any] = {"feature_channels": (4, 6, 8), "head_channels": (6, 8, 10)}


def fill_by_rule(*modules: nn.Module) -> list[tuple[int, ...]]:
    """Weights by the rule of the published arrays; returns the parameters' shapes in order."""
    shapes = []
    for module in modules:
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            z = np.random.RandomState(10000 + len(shapes)).standard_normal(shape)
            if len(shape) > 1:
                z *= 0.004 if ".flow." in name else np.sqrt(2 / (1.04 * np.prod(shape[1:])))
            elif "norm" in name:
                z = 0.1 * z + name.endswith("weight")
            else:
                z *= 0.05
            parameter.data = torch.from_numpy(z).float()
            shapes.append(shape)
    return shapes


def pyramid(size: Sequence[int], batch: int = 1, channels: Sequence[int] = (4, 6, 8)) -> list[Tensor]:
    return [torch.randn(batch, c, *(-(-n // 2**level) for n in size)) for level, c in enumerate(channels)]


def trained_a_little(decoder: InverseConsistentDecoder, std: float = 0.05) -> InverseConsistentDecoder:
    """Heads that start as they do see no motion; these do."""
    for head in decoder.heads:
        nn.init.normal_(head.flow.conv.weight, std=std)
        nn.init.normal_(head.flow.conv.bias, std=0.1)
    return decoder


def test_published_fields(shared: Path, device: torch.device) -> None:
    folder = shared / "parity/dual_stream_pyramid"
    encoder, decoder = DualStreamEncoder(), InverseConsistentDecoder(tolerance=1e-5)
    order = json.loads((folder / "canonical_parameter_order.json").read_text())["DP-ConvIC-MF"]
    assert fill_by_rule(encoder, decoder) == [tuple(entry[3]) for entry in order]
    images = np.load(folder / "DP-Conv-MFC_32x48x32.npz")
    moving, fixed = (torch.from_numpy(images[name]).to(device) for name in ("moving", "fixed"))
    encoder, decoder = encoder.to(device), decoder.to(device)
    with torch.no_grad():
        found = decoder(encoder(moving), encoder(fixed), moving.shape[2:])
    expected = np.load(folder / "DP-ConvIC-MF_32x48x32_tight.npz")
    for ours, theirs in (("ddf", "disp_fwd"), ("inverse_ddf", "disp_inv")):
        torch.testing.assert_close(found[ours].cpu(), torch.from_numpy(expected[theirs]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("inputs", "count"), [("mf", 2_346_575), ("c", 1_800_015)])
def test_published_number_of_parameters(inputs: str, count: int) -> None:
    assert sum(p.numel() for p in InverseConsistentDecoder(inputs=inputs).parameters()) == count


def test_published_features_moved_by_a_field_of_the_image(shared: Path) -> None:
    arrays = np.load(shared / "parity/dual_stream_pyramid/bspline_and_feature_sampling.npz")
    field, features = torch.from_numpy(arrays["fulldisp"]), torch.from_numpy(arrays["feat"])
    moved = warp(features, at_feature_centres(field, 4, (4, 4, 4)) / 4)
    torch.testing.assert_close(moved, torch.from_numpy(arrays["feat_warped"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("factor", "expected"), [(1, [0.0, 1, 2, 3, 4]), (2, [0.5, 2.5, 4]), (3, [1.0, 4]), (4, [1.5, 4])]
)
def test_centres(factor: int, expected: list[float]) -> None:
    """A field that says its own position, on five voxels: the centre of the last block lies beyond them."""
    field = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 2, 5, 5)
    found = at_feature_centres(field, factor, (len(expected), 1))
    torch.testing.assert_close(found[0, 0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize("inputs", ["mf", "c"])
@pytest.mark.parametrize("size", [(13, 10), (9, 8, 11)])
def test_any_size_both_ways_at_once(inputs: str, size: tuple[int, ...], device: torch.device) -> None:
    decoder = trained_a_little(InverseConsistentDecoder(len(size), inputs=inputs, **SMALL)).to(device)
    moving, fixed = ([level.to(device) for level in pyramid(size, 2)] for _ in range(2))
    found, exchanged = decoder(moving, fixed, size), decoder(fixed, moving, size)
    assert found["ddf"].shape == found["inverse_ddf"].shape == (2, len(size), *size)
    assert found["ddf"].dtype == torch.float32 and float(found["ddf"].detach().abs().max()) > 0.2
    torch.testing.assert_close(exchanged["ddf"], found["inverse_ddf"], rtol=0, atol=0)
    torch.testing.assert_close(exchanged["inverse_ddf"], found["ddf"], rtol=0, atol=0)
    torch.testing.assert_close(exchanged["inversion_iterations"], found["inversion_iterations"].flip(1))


@pytest.mark.parametrize("inputs", ["mf", "c"])
def test_fields_invert_each_other_and_do_not_fold(inputs: str) -> None:
    torch.manual_seed(1)
    size = (16, 18, 20)
    decoder = trained_a_little(InverseConsistentDecoder(inputs=inputs, tolerance=1e-3, **SMALL), 0.02)
    with torch.no_grad():
        found = decoder(pyramid(size), pyramid(size), size)
    assert float(found["ddf"].abs().max()) > 0.3
    assert float(compose(found["ddf"], found["inverse_ddf"]).abs().mean()) < 0.05
    for name in ("ddf", "inverse_ddf"):
        assert float(digital_jacobian_determinants(found[name]).min()) > 0


def test_a_network_that_has_learnt_nothing_moves_nothing() -> None:
    with torch.no_grad():
        found = InverseConsistentDecoder(2, **SMALL)(pyramid((8, 8)), pyramid((8, 8)), (8, 8))
    assert float(found["ddf"].abs().max()) < 1e-2


def test_items_do_not_depend_on_their_batch() -> None:
    decoder = trained_a_little(InverseConsistentDecoder(2, **SMALL))
    decoder.tolerance = 1e-4
    moving, fixed = pyramid((12, 11), 2), pyramid((12, 11), 2)
    for features in (moving, fixed):  # the second item has no motion to find
        for level in features:
            level[1] = 0
    with torch.no_grad():
        together = decoder(moving, fixed, (12, 11))
        alone = decoder([f[:1] for f in moving], [f[:1] for f in fixed], (12, 11))
    torch.testing.assert_close(together["ddf"][:1], alone["ddf"], rtol=0, atol=1e-5)
    assert together["inversion_iterations"].shape == (2, 2, 3)
    assert torch.equal(together["inversion_iterations"][:1], alone["inversion_iterations"])


def test_inversion_is_reported() -> None:
    decoder = trained_a_little(InverseConsistentDecoder(2, max_iterations=1, **SMALL))
    with pytest.warns(UserWarning, match="no inverse"):
        found = decoder(pyramid((8, 8)), pyramid((8, 8)), (8, 8))
    assert int(found["inversion_iterations"].max()) == 1
    assert float(found["inversion_residual"].max()) > decoder.tolerance


@pytest.mark.parametrize("inputs", ["mf", "c"])
def test_one_side_at_a_time_is_both_at_once(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = trained_a_little(InverseConsistentDecoder(2, inputs=inputs, **SMALL))
    moving, fixed = pyramid((9, 12), 2), pyramid((9, 12), 2)
    with torch.no_grad():
        together = decoder(moving, fixed, (9, 12))["ddf"]
        monkeypatch.setattr(slabs, "_CPU_SLAB", 2 * 10 * 12 * 3)  # of a few rows
        monkeypatch.setattr(fixed_point, "_LARGE", 0)
        one_by_one, swapped = decoder(moving, fixed, (9, 12)), decoder(fixed, moving, (9, 12))
    torch.testing.assert_close(one_by_one["ddf"], together, rtol=0, atol=1e-5)
    assert torch.equal(one_by_one["ddf"], swapped["inverse_ddf"])


def test_the_lists_of_features_are_emptied_if_so_asked_only() -> None:
    decoder, moving, fixed = InverseConsistentDecoder(2, **SMALL), pyramid((8, 8)), pyramid((8, 8))
    with torch.no_grad():
        kept = decoder(moving, fixed, (8, 8))["ddf"]
        assert len(moving) == len(fixed) == 3
        torch.testing.assert_close(decoder(moving, fixed, (8, 8), release=True)["ddf"], kept)
    assert moving == fixed == []


@pytest.mark.parametrize("inputs", ["mf", "c"])
def test_a_symmetric_head_is_a_head_on_both_inputs(inputs: str) -> None:
    head = trained_a_little(InverseConsistentDecoder(3, inputs=inputs, **SMALL)).heads[1]
    half = head.block.conv1.weight.shape[1] // 2
    a, b = torch.randn(2, 1, half, 4, 5, 6)
    expected = torch.cat((head(torch.cat((a, b), 1)), head(torch.cat((b, a), 1))))
    torch.testing.assert_close(head.both(a + b, a - b), expected, rtol=0, atol=1e-5)


def test_gradients_reach_every_weight_and_checkpoints_change_none() -> None:
    gradients = []
    for checkpoint_heads in (False, True):
        torch.manual_seed(0)
        decoder = trained_a_little(InverseConsistentDecoder(2, checkpoint_heads=checkpoint_heads, **SMALL))
        moving, fixed = pyramid((10, 12)), [level.requires_grad_() for level in pyramid((10, 12))]
        found = decoder(moving, fixed, (10, 12))
        (found["ddf"].square().mean() + found["inverse_ddf"].sum()).backward()
        named = dict(decoder.named_parameters())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in named.values())
        # Biases in front of a norm have none.
        assert all(float(p.grad.abs().max()) > 0 for name, p in named.items() if p.grad is not None and p.ndim > 1)
        gradients.append([p.grad for p in named.values()] + [level.grad for level in fixed])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_gradient_is_that_of_finite_differences() -> None:
    """Along one direction of all weights at once, with a tight solver."""
    decoder = trained_a_little(InverseConsistentDecoder(2, tolerance=1e-6, max_iterations=200, **SMALL))
    moving, fixed, weight = pyramid((8, 12)), pyramid((8, 12)), torch.randn(1, 2, 8, 12)

    def value() -> Tensor:
        found = decoder(moving, fixed, (8, 12))
        return ((found["ddf"] - found["inverse_ddf"]).double() * weight).sum()

    value().backward()
    flows = [p for head in decoder.heads for p in head.flow.parameters()]
    direction = [torch.randn_like(p) for p in flows]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(flows, direction, strict=True) if p.grad is not None)
    step, values = 1e-3, []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(flows, direction, strict=True):
                p.add_(sign * step * d)
            values.append(float(value()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_autocast_keeps_fields_in_float32() -> None:
    decoder = trained_a_little(InverseConsistentDecoder(2, inputs="c", **SMALL))
    moving, fixed = pyramid((8, 12)), pyramid((8, 12))
    plain = decoder(moving, fixed, (8, 12))["ddf"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [[level.bfloat16() for level in features] for features in (moving, fixed)]
        found = decoder(*half, (8, 12))
    found["ddf"].sum().backward()
    assert found["ddf"].dtype == found["inverse_ddf"].dtype == torch.float32
    torch.testing.assert_close(found["ddf"], plain, rtol=0, atol=0.1)


def test_pyramid() -> None:
    decoder = trained_a_little(InverseConsistentDecoder(2, **SMALL))
    found = decoder(pyramid((8, 12)), pyramid((8, 12)), (8, 12), pyramid=True)
    assert len(found["pyramid"]) == len(found["inverse_pyramid"]) == 3
    assert found["pyramid"][-1] is found["ddf"] and found["inverse_pyramid"][-1] is found["inverse_ddf"]
    assert all(stage.shape == (1, 2, 8, 12) for stage in found["pyramid"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "mfc"}, "inputs"),
        ({"bound": 1.0}, "bound"),
        ({"head_channels": (4, 4)}, "one number a level"),
        ({"strides": (1, 2)}, "one number a level"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InverseConsistentDecoder(2, **{**SMALL, **options})


def test_features_of_another_image_size() -> None:
    decoder = InverseConsistentDecoder(2, **SMALL)
    with pytest.raises(ValueError, match=r"fixed features.*\(16, 16\).*\(8, 8\)"):
        decoder(pyramid((16, 16)), pyramid((8, 8)), (16, 16))
