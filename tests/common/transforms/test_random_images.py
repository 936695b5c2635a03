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
"""Pairs of random images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.spatial import identity_grid, warp
from common.transforms import ImagePair, PairOptions, generate_pair

SIZE = (32, 28, 36)


def inside(ddf: Tensor) -> Tensor:
    """Where the field stays within the image, (B, 1, *S)."""
    position = identity_grid(ddf.shape[2:]) + ddf
    last = torch.tensor(ddf.shape[2:]).view(1, -1, *(1,) * (ddf.ndim - 2)) - 1
    return ((position >= 0) & (position <= last)).all(1, keepdim=True)


def mean_dice(one: Tensor, two: Tensor, labels: range) -> float:
    scores = []
    for label in labels:
        a, b = one == label, two == label
        if bool(a.any() or b.any()):
            scores.append(2.0 * float((a & b).sum()) / float(a.sum() + b.sum()))
    return float(np.mean(scores))


def equal(one: ImagePair, two: ImagePair) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:5], two[:5], strict=True))


@pytest.mark.parametrize("background", ["zeros", "border"])
@pytest.mark.parametrize("size", [(48, 48, 48), (80, 72)])
def test_the_field_registers_the_pair(size: tuple[int, ...], background: str) -> None:
    pair = generate_pair(size, seed=0, batch_size=4, background=background)
    moved = warp(pair.moving, pair.ddf)
    label = warp(pair.moving_label, pair.ddf, mode="nearest", padding=background)
    view = inside(pair.ddf)
    before = (pair.moving - pair.fixed)[view].abs().mean()
    after = (moved - pair.fixed)[view].abs().mean()
    # What is left is the second interpolation of the edges between tissues.
    assert float(after) < 0.012
    assert float(after) < 0.15 * float(before)
    fixed_label = torch.where(view, pair.fixed_label, -1)
    moved_label = torch.where(view, label, -1)
    assert mean_dice(moved_label, fixed_label, range(1, 17)) > 0.9
    assert mean_dice(torch.where(view, pair.moving_label, -1), fixed_label, range(1, 17)) < 0.8


def test_the_field_is_exact_on_a_smooth_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a linear ramp as the scene nothing is lost to interpolation, so moving(x + u(x)) = fixed(x) to rounding."""
    import common.transforms.random_images as module

    ramp = torch.linspace(0, 1, 64).view(1, 1, -1, 1).expand(1, 1, 64, 64).contiguous()
    monkeypatch.setattr(module, "look_up", lambda table, labels: ramp)
    pair = generate_pair((64, 64), seed=1, background="border", amplitudes=(18.0,))
    view = inside(pair.ddf)
    # Beyond its ends the scene is continued as a constant, and that kink is lost to interpolation.
    view &= (pair.fixed > 0.1) & (pair.fixed < 0.9)
    assert float(view.float().mean()) > 0.5
    assert float((pair.moving - pair.fixed).abs().max()) > 0.1
    assert float((warp(pair.moving, pair.ddf) - pair.fixed)[view].abs().max()) < 1e-4


def test_dice_before_registration_is_as_published() -> None:
    pairs = generate_pair((64, 64, 64), seed=0, batch_size=8)
    scores = [mean_dice(m, f, range(1, 17)) for m, f in zip(pairs.moving_label, pairs.fixed_label, strict=True)]
    assert float(np.mean(scores)) == pytest.approx(0.612, abs=0.09)


@pytest.mark.parametrize("size", [(17, 23, 9), (31, 45), (1, 20, 20), (2, 2, 2), (3, 3), (1, 1)])
def test_any_size(size: tuple[int, ...], device: torch.device) -> None:
    pair = generate_pair(size, seed=0, batch_size=2, device=device)
    assert pair.ddf.shape == (2, len(size), *size)
    for image in (pair.moving, pair.fixed):
        assert image.shape == (2, 1, *size)
        assert image.dtype == torch.float32
        assert image.device.type == device.type
        assert image.min() >= 0
        assert image.max() <= 1
    for label in (pair.moving_label, pair.fixed_label):
        assert label.dtype == torch.int32
        assert label.min() >= 0
        assert label.max() <= 16
    assert bool(torch.isfinite(pair.ddf).all())


def test_small_images_show_the_same_scene_smaller() -> None:
    large = generate_pair((64, 64), seed=4)
    small = generate_pair((32, 32), seed=4)
    # Lattices agree up to the half voxel by which the corners of the two grids differ.
    agree = (large.moving_label[..., ::2, ::2] == small.moving_label).float().mean()
    assert float(agree) > 0.9
    ratio = large.ddf.square().mean().sqrt() / small.ddf.square().mean().sqrt()
    assert float(ratio) == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"noise_prob": 1.0, "bias_prob": 1.0, "multimodal_prob": 0.5}])
def test_a_seed_reproduces_a_pair(options: dict[str, Any]) -> None:
    batch = generate_pair(SIZE, seed=3, batch_size=2, **options)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 -- the legacy global state is what is tested
    assert equal(batch, generate_pair(SIZE, seed=3, batch_size=2, **options))
    alone = generate_pair(SIZE, seed=batch.seeds[1], **options)
    for whole, one in zip(batch[:5], alone[:5], strict=True):
        assert torch.allclose(whole[1:], one, atol=1e-4)
    assert not torch.equal(batch.moving[0], batch.moving[1])


def test_generators_and_global_state() -> None:
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002 -- the legacy global state is what is tested
    first = generate_pair(SIZE, generator=torch.Generator().manual_seed(1))
    assert equal(first, generate_pair(SIZE, generator=torch.Generator().manual_seed(1)))
    assert not equal(first, generate_pair(SIZE, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(state, torch.get_rng_state())
    assert numpy_state == str(np.random.get_state())  # noqa: NPY002 -- the legacy global state is what is tested


@pytest.mark.parametrize(
    ("options", "changes_fields"),
    [
        ({"multimodal_prob": 1.0}, False),
        ({"blur_prob": 1.0}, False),
        ({"bias_prob": 1.0}, False),
        ({"noise_prob": 1.0}, False),
        ({"gamma_prob": 1.0}, False),
        ({"background": "border"}, False),
        ({"num_labels": 4}, True),
        ({"shape_scale": (12.0, 12.0)}, True),
        ({"volume_spread": 0.5}, False),
        ({"field_scale": 16.0}, True),
        ({"amplitudes": (2.0,)}, True),
    ],
)
def test_every_option_has_an_effect_and_only_its_own(options: dict[str, Any], changes_fields: bool) -> None:
    plain = generate_pair(SIZE, seed=1)
    other = generate_pair(SIZE, seed=1, **options)
    assert float((plain.fixed - other.fixed).abs().mean()) > 2e-3
    assert changes_fields or torch.equal(plain.ddf, other.ddf)
    if next(iter(options)).endswith("_prob"):
        assert torch.equal(plain.fixed_label, other.fixed_label)


def test_noise_is_gaussian_and_centred() -> None:
    # One tissue and no deformation: the image is noise, windowed; its skewness and excess are a normal distribution's.
    noise = generate_pair((64, 64), seed=0, num_labels=1, amplitudes=(0.0,), noise_prob=1.0).moving
    z = (noise - noise.mean()) / noise.std()
    assert abs(float((z**3).mean())) < 0.15
    assert float((z**4).mean()) == pytest.approx(3.0, abs=0.3)


def test_contrast_is_shared_unless_multimodal() -> None:
    still = {"amplitudes": (0.0,), "seed": 2}
    same = generate_pair(SIZE, **still)  # type: ignore[arg-type]
    assert torch.equal(same.moving, same.fixed)
    other = generate_pair(SIZE, multimodal_prob=1.0, **still)  # type: ignore[arg-type]
    assert torch.equal(other.moving_label, other.fixed_label)
    assert float((other.moving - other.fixed).abs().mean()) > 0.05
    for image in (other.moving, other.fixed):
        assert float(image.max()) == 1.0
        assert float(image.min()) == 0.0


def test_background_is_label_and_intensity_zero() -> None:
    pair = generate_pair((48, 48, 48), seed=0, batch_size=2, amplitudes=(18.0,))
    outside = pair.fixed_label == 0
    assert 0.01 < float(outside.float().mean()) < 0.4
    # Voxels whose nearest scene voxel is outside are at most half inside.
    assert float(pair.fixed[outside].mean()) < 0.1
    border = generate_pair((48, 48, 48), seed=0, amplitudes=(18.0,), background="border")
    assert border.fixed_label.min() >= 1


def test_degenerate_options_are_finite() -> None:
    pair = generate_pair(SIZE, seed=0, num_labels=1, amplitudes=(0.0,), background="border", gamma_prob=1.0)
    assert not bool(pair.moving.any())
    assert bool((pair.moving_label == 1).all())
    assert not bool(pair.ddf.any())


def test_autocast_changes_nothing() -> None:
    plain = generate_pair((24, 24), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(plain, generate_pair((24, 24), seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "num_labels"),
        ({"noise_prob": 1.5}, "noise_prob"),
        ({"shape_scale": (5.0, 2.0)}, "shape_scale"),
        ({"amplitudes": ()}, "amplitudes"),
        ({"amplitudes": (float("nan"),)}, "amplitudes"),
        ({"background": "reflect"}, "background"),
        ({"field_scale": 0.0}, "field_scale"),
        ({"volume_spread": -1.0}, "volume_spread"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PairOptions(**options)


@pytest.mark.parametrize("size", [(8,), (4, 4, 4, 4), (0, 8)])
def test_wrong_sizes_are_named(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="spatial_size"):
        generate_pair(size)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="octaves"):
        generate_pair((8, 8), octaves=3)
