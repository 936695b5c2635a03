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

import builtins
from typing import Any

import pytest
import torch
from scipy.ndimage import gaussian_filter

from bundles.dual_stream_pyramid.scripts import greedy
from bundles.dual_stream_pyramid.scripts.greedy import Greedy
from common.losses import LNCC
from common.metrics import DiceScore
from common.spatial import affine_to_ddf, compose, integrate, invert, warp

SIZES = {2: (41, 46), 3: (30, 26, 29)}


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "without_the_package" not in request.node.name:
        pytest.importorskip("picsl_greedy", reason="picsl_greedy is not installed (extra [bench])")


def texture(size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A picture (1, 1, *S) with something to align everywhere, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    values = gaussian_filter(torch.randn(size, generator=generator).numpy(), 2.5)
    return torch.from_numpy((values - values.min()) / (values.max() - values.min()))[None, None].float()


def smooth_motion(size: tuple[int, ...], most: float = 3.0) -> torch.Tensor:
    """A smooth field (1, d, *S) of at most that many voxels."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((1, len(size), *size), generator=generator).numpy()
    velocity = torch.from_numpy(gaussian_filter(noise, (0, 0, *[6.0] * len(size))))
    field = integrate(velocity * most / velocity.abs().max())
    return field * most / field.abs().max()


def inner(field: torch.Tensor, rim: int = 5) -> torch.Tensor:
    return field[(..., *(slice(rim, -rim) for _ in field.shape[2:]))]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("spacing", [1.0, (0.8, 1.5, 1.2)])
def test_a_shift_is_found_in_voxels(dims: int, spacing: Any) -> None:
    shift = torch.tensor([2.0, -1.0, 1.5][:dims]).view(1, dims, *[1] * dims)
    moving = texture(SIZES[dims])
    true = shift.expand(1, dims, *SIZES[dims]).contiguous()
    spacing = spacing[:dims] if isinstance(spacing, tuple) else spacing
    ddf = Greedy(dims, spacing=spacing)(torch.cat([moving, warp(moving, true)], 1))
    assert ddf.dtype == torch.float32 and ddf.shape == true.shape
    assert (inner(ddf) - shift).flatten(2).median(2).values.abs().max() < 0.03
    assert (inner(ddf) - shift).abs().mean() < 0.15


@pytest.mark.parametrize("dims", [2, 3])
def test_a_smooth_motion_is_found(dims: int) -> None:
    moving, true = texture(SIZES[dims]), smooth_motion(SIZES[dims])
    fixed = warp(moving, true)
    label = (moving > 0.55).float()
    ddf = Greedy(dims)(torch.cat([moving, fixed], 1))
    before, after = (float(-LNCC()(image, fixed)) for image in (moving, warp(moving, ddf)))
    target = (warp(label, true) > 0.5).float()
    overlaps = [DiceScore([1])(part.int(), target.int()).item() for part in (label, (warp(label, ddf) > 0.5).float())]
    assert after > before
    assert 1 - overlaps[1] < 0.35 * (1 - overlaps[0])
    assert inner(ddf - true).norm(dim=1).mean() < 0.25 * inner(true).norm(dim=1).mean()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_field_is_the_warp_that_greedy_itself_applies(dims: int, affine: bool) -> None:
    """Sign, axes, spacing, order of affine and warp, rounding: all of it against Greedy's own resliced image."""
    spacing = (0.8, 1.5, 1.2)[:dims]
    moving = texture(SIZES[dims])
    turn = torch.eye(dims + 1)
    turn[0, :2], turn[1, :2], turn[:dims, dims] = torch.tensor([1.0, 0.08]), torch.tensor([-0.06, 0.97]), 0.7
    fixed = warp(moving, compose(affine_to_ddf(turn, SIZES[dims]), smooth_motion(SIZES[dims], 1.5)))
    network = Greedy(dims, spacing=spacing, affine=affine, threads=1)
    tool = network._tool()
    network._tool = lambda: tool
    ddf = network(torch.cat([moving, fixed], 1))
    scans = {n: network._to_scan(i[0, 0].double().numpy(), spacing) for n, i in {"f": fixed, "m": moving}.items()}
    chain = "warp affine" if affine else "warp"
    tool.execute(f"-V 0 -threads 1 -rf f -rm m resliced -r {chain}", resliced=None, **scans)
    resliced = torch.from_numpy(network._from_scan(tool["resliced"]).T.copy()).float()
    assert (warp(moving, ddf, padding="zeros")[0, 0] - resliced).abs().max() < 2e-5
    assert (warp(moving, ddf) - fixed).abs().mean() < 0.3 * (moving - fixed).abs().mean()


@pytest.mark.parametrize("affine", [False, True])
def test_the_inverse_undoes_the_field(affine: bool) -> None:
    moving, true = texture(SIZES[3]), smooth_motion(SIZES[3], 2.0)
    network = Greedy(affine=affine, inverse=True, spacing=(1.0, 1.2, 0.9))
    fields = network.fields(torch.cat([moving, warp(moving, true)], 1))
    assert inner(compose(fields["ddf"], fields["inverse_ddf"])).norm(dim=1).mean() < 0.02
    assert inner(fields["inverse_ddf"] - invert(fields["ddf"]).ddf).norm(dim=1).mean() < 0.03


def test_a_batch_is_registered_pair_by_pair_and_alike_each_time() -> None:
    moving, fixed = texture((24, 26), 1), texture((24, 26), 2)
    network = Greedy(2, affine=True)
    one, other = torch.cat([moving, fixed], 1), torch.cat([fixed, moving], 1)
    both = network(torch.cat([one, other]))
    assert torch.equal(both[:1], network(one)) and torch.equal(both[1:], network(other))


@pytest.mark.parametrize("size", [(7, 19, 17), (17, 3)])
def test_any_size(size: tuple[int, ...]) -> None:
    moving = texture(size)
    ddf = Greedy(len(size))(torch.cat([moving, moving.roll(1, 2)], 1))
    assert ddf.shape == (1, len(size), *size) and ddf.isfinite().all()


def test_under_autocast_fields_stay_single_precision(device: torch.device) -> None:
    pair = torch.cat([texture((24, 20)), texture((24, 20), 1)], 1).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ddf = Greedy(2).to(device)(pair)
    assert ddf.dtype == torch.float32 and ddf.device.type == device.type
    assert torch.equal(ddf.cpu(), Greedy(2)(pair.cpu()))


def test_it_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    Greedy(2)(torch.cat([texture((24, 20)), texture((24, 20), 1)], 1))
    assert capfd.readouterr().out == ""


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"metric must be one of .* got 'LNCC'"):
        Greedy(metric="LNCC")
    with pytest.raises(ValueError, match="spacing must be one positive number or 3"):
        Greedy(spacing=(1.0, 1.0))
    with pytest.raises(ValueError, match="seed must be at least 1"):
        Greedy(seed=0)
    with pytest.raises(ValueError, match="one channel, got a pair with 4"):
        Greedy(2)(torch.zeros(1, 4, 16, 16))


def test_what_greedy_refuses_comes_with_its_command() -> None:
    network = Greedy(2)
    network.smoothing = "nothing"
    with pytest.raises(RuntimeError, match=r"Greedy failed at .*-s nothing"):
        network(torch.rand(1, 2, 20, 20))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "picsl_greedy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install -c constraints\.txt picsl_greedy"):
        greedy.Greedy()
