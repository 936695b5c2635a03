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

import pytest
import torch

from common.networks import ENCODER_PRESETS, SwinEncoder, build_encoder, encode_pair


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", sorted(ENCODER_PRESETS))
def test_every_preset_declares_what_it_returns(name: str, dims: int) -> None:
    for preset in ENCODER_PRESETS[name]:
        encoder = build_encoder(name, dims, preset=preset)
        assert encoder.spatial_dims == dims
        side = max(encoder.strides)
        with torch.no_grad():
            maps = encoder(torch.rand(1, encoder.in_channels, *(side,) * dims))
        assert tuple(m.shape[1] for m in maps) == encoder.feature_channels
        assert tuple(side // m.shape[2] for m in maps) == encoder.strides


@pytest.mark.parametrize("name", sorted(ENCODER_PRESETS))
def test_small_is_smaller(name: str) -> None:
    sizes = {p: sum(w.numel() for w in build_encoder(name, preset=p).parameters()) for p in ("small", "base")}
    assert sizes["small"] < sizes["base"]


def test_options_replace_the_preset() -> None:
    encoder = build_encoder("swin", 2, preset="small", embed_dim=8, window_size=(2, 3))
    assert isinstance(encoder, SwinEncoder)
    assert encoder.feature_channels == (8, 16, 32)
    assert encoder.window_size == (2, 3)
    assert encode_pair(encoder, torch.rand(1, 2, 16, 16))[0].shape == (1, 8, 8, 8)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(
        ValueError, match=r"no encoder 'unet': there are \['dual_stream', 'swin', 'vfa', 'voxelmorph'\]"
    ):
        build_encoder("unet")
    with pytest.raises(ValueError, match="no preset 'huge'"):
        build_encoder("swin", preset="huge")
