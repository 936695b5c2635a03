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
"""Encoders by name, so that a configuration can choose one with a word."""

from __future__ import annotations

from typing import Any

from common.networks.base import Encoder
from common.networks.dual_stream import DualStreamEncoder
from common.networks.swin import SwinEncoder
from common.networks.vfa import VFAEncoder
from common.networks.voxelmorph import VoxelMorphEncoder

__all__ = ["ENCODER_PRESETS", "build_encoder"]

# "base" is what was published; "small" trains on a few CPU cores.
ENCODER_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dual_stream": {"base": {}, "small": {"channels": (8, 16, 16, 32, 32)}},
    "swin": {
        "base": {},
        "small": {
            "embed_dim": 24,
            "depths": (2, 2, 2),
            "num_heads": (4, 4, 4),
            "window_size": 4,
            "patch_size": 2,
            "drop_path": 0.1,
        },
    },
    "vfa": {"base": {}, "small": {"start_channels": 4, "max_channels": 32}},
    "voxelmorph": {"base": {}, "small": {"channels": (16, 32, 32)}},
}
_CLASSES: dict[str, type[Encoder]] = {
    "dual_stream": DualStreamEncoder,
    "swin": SwinEncoder,
    "vfa": VFAEncoder,
    "voxelmorph": VoxelMorphEncoder,
}


def build_encoder(name: str, spatial_dims: int = 3, *, preset: str = "base", **options: Any) -> Encoder:
    """An encoder by name.

    Args:
        name: "dual_stream", "swin", "vfa" or "voxelmorph".
        spatial_dims: 2 or 3.
        preset: "base", as published, or "small", for CPUs.
        options: constructor arguments, which replace those of the preset.

    Raises:
        ValueError: on an unknown name or preset; the known ones are listed.
    """
    if name not in ENCODER_PRESETS:
        raise ValueError(f"no encoder '{name}': there are {sorted(ENCODER_PRESETS)}")
    presets = ENCODER_PRESETS[name]
    if preset not in presets:
        raise ValueError(f"encoder '{name}' has no preset '{preset}': there are {sorted(presets)}")
    return _CLASSES[name](spatial_dims=spatial_dims, **{**presets[preset], **options})
