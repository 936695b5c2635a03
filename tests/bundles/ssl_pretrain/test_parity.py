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
"""The published networks and ours are the same function: figures of parity/README.md.

No array is read: the weights follow from their published names, the inputs from seeds. The figures are in the README of
the parity folder, sections ssl_pretrain and spatially_varying_reg (whose body is TransMorph-TVF).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bundles.ssl_pretrain.scripts.convert import to_published, to_warpzoo
from bundles.ssl_pretrain.scripts.ssl_network import SSLRegistration
from common.networks import SwinEncoder, TransMorphTVF, average_pool, interpolate_bias_tables


def _weight(name: str, shape: Sequence[int]) -> Tensor:
    r = torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if re.search(r"norm\d?\.weight$", name):
        return 1 + 0.1 * r
    if name.endswith("flow_sigma.bias"):
        return -10 + 0.1 * r
    if len(shape) == 5:
        return r / math.sqrt(math.prod(shape[1:]))
    return 0.02 * r


def _published(network: SSLRegistration) -> dict[str, Tensor]:
    return {name: _weight(name, t.shape) for name, t in to_published(network.state_dict()).items()}


@pytest.fixture(scope="module")
def network() -> SSLRegistration:
    network = SSLRegistration(SwinEncoder(window_size=2), downsample=1).eval()
    network.load_state_dict(to_warpzoo(_published(network)))
    return network


@pytest.fixture(scope="module")
def pair() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.cat([torch.rand(1, 1, 64, 64, 64, generator=generator) for _ in range(2)], dim=1)


def test_features_of_the_encoder(network: SSLRegistration, pair: Tensor) -> None:
    with torch.no_grad():
        maps = network.encoder(pair)
    assert [level.flatten()[0].item() for level in maps] == pytest.approx([-0.773791, -0.360234, 1.524894], abs=1e-4)
    assert [level.abs().mean().item() for level in maps] == pytest.approx([0.79857, 0.78833, 0.80327], abs=1e-4)


def test_flow_of_the_pretraining_network(network: SSLRegistration, pair: Tensor) -> None:
    with torch.no_grad():
        ddf = network(pair)
    found = [ddf.mean(), ddf.std(), ddf.abs().max()]
    assert [value.item() for value in found] == pytest.approx([-1.935190, 1.865399, 9.725881], abs=1e-4)
    assert ddf[0, :, 32, 32, 32].tolist() == pytest.approx([-2.887742, 0.812401, -0.777390], abs=1e-4)


def test_the_same_weights_run_with_another_window_and_size(network: SSLRegistration) -> None:
    other = SSLRegistration(SwinEncoder(window_size=(2, 3, 3)), downsample=1).eval()
    other.load_state_dict(interpolate_bias_tables(network.state_dict(), other))
    with torch.no_grad():
        ddf = other(torch.rand(1, 2, 40, 35, 48))
    assert ddf.shape == (1, 3, 40, 35, 48)
    assert torch.isfinite(ddf).all()
    assert ddf.abs().max() > 0.1


def _numpy_weight(name: str, shape: Sequence[int]) -> Tensor:
    z = 0.05 * np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(math.prod(shape))
    z += len(shape) == 1 and name.endswith(".weight")
    return torch.from_numpy(z.reshape(shape).astype(np.float32))


_TVF_NAMES = (
    (r"^decoder\.up\.(\d)\.conv(\d)\.conv\.", r"up\1.conv\2.0."),
    (r"^decoder\.image_units\.0\.conv\.", "c1.0."),
    (r"^decoder\.image_units\.0\.norm\.", "c1.1."),
    (r"^time_steps\.steps\.(\d)\.pair_unit\.conv\.", r"cs.\1.0."),
    (r"^time_steps\.steps\.(\d)\.pair_unit\.norm\.", r"cs.\1.1."),
    (r"^time_steps\.steps\.(\d)\.up\.conv(\d)\.conv\.", r"up3s.\1.conv\2.0."),
    (r"^time_steps\.steps\.(\d)\.head\.conv\.", r"reg_heads.\1.0."),
)


def test_flow_of_the_time_varying_decoder() -> None:
    encoder = SwinEncoder(embed_dim=24, depths=(2, 2, 2), num_heads=(4, 4, 4), window_size=2)
    network = TransMorphTVF(encoder, steps=3, update="self_warped", norm="batch", padding="zeros", downsample=1).eval()
    published = {k: _numpy_weight(f"transformer.{k}", v.shape) for k, v in to_published(encoder.state_dict()).items()}
    state = {f"encoder.{k}": v for k, v in to_warpzoo(published, "encoder").items()}
    for name, tensor in network.state_dict().items():
        if name.startswith("encoder.") or "running" in name or name.endswith("num_batches_tracked"):
            continue
        (old,) = [re.sub(ours, theirs, name) for ours, theirs in _TVF_NAMES if re.search(ours, name)]
        state[name] = _numpy_weight(old, tensor.shape)
    network.load_state_dict(state | {k: v for k, v in network.state_dict().items() if k not in state})
    random = np.random.RandomState(0)
    pair = torch.from_numpy(
        np.concatenate([random.rand(1, 1, 64, 64, 64) for _ in range(2)], axis=1).astype(np.float32)
    )
    with torch.no_grad():
        ddf = network(average_pool(pair, 2))
    assert ddf.double().sum().item() == pytest.approx(7134.6862, rel=1e-5)
    assert ddf.abs().mean().item() == pytest.approx(0.70140003, abs=1e-5)
    assert ddf[0, :, 5, 7, 9].tolist() == pytest.approx([0.48722088, -0.0077663073, -1.7352037], abs=1e-4)
