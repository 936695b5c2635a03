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
"""Networks and blocks that two or more bundles share."""

from __future__ import annotations

from common.networks.attention import vector_field_attention
from common.networks.base import (
    Encoder,
    RegistrationNetwork,
    as_tuple,
    average_pool,
    crop_to,
    encode_pair,
    pad_to_multiple,
    paired_channels,
    split_pair,
    to_image_grid,
)
from common.networks.blocks import ConvUnit, FlowHead, InstanceNorm, UpStage, upsample_to
from common.networks.convolution import convolution, convolve
from common.networks.correlation import both_ways, local_correlation
from common.networks.dual_stream import DualStreamEncoder
from common.networks.factory import ENCODER_PRESETS, build_encoder
from common.networks.normalization import normalize_and_activate
from common.networks.residual import ResidualBlock
from common.networks.slabs import convolve_by_slabs, convolve_rows, is_large, residual_by_slabs
from common.networks.slicewise import SliceWise, for_stacks
from common.networks.swin import SwinEncoder
from common.networks.transmorph_tvf import PyramidDecoder, TimeSteps, TransMorphTVF, TVFOutput
from common.networks.vfa import VFAEncoder
from common.networks.voxelmorph import VoxelMorph, VoxelMorphEncoder, VoxelMorphUNet
from common.networks.weights import LoadReport, interpolate_bias_tables, load_encoder_weights

__all__ = [
    "ConvUnit",
    "DualStreamEncoder",
    "ENCODER_PRESETS",
    "Encoder",
    "FlowHead",
    "InstanceNorm",
    "LoadReport",
    "PyramidDecoder",
    "RegistrationNetwork",
    "ResidualBlock",
    "SliceWise",
    "SwinEncoder",
    "TVFOutput",
    "TimeSteps",
    "TransMorphTVF",
    "UpStage",
    "VFAEncoder",
    "VoxelMorph",
    "VoxelMorphEncoder",
    "VoxelMorphUNet",
    "as_tuple",
    "average_pool",
    "both_ways",
    "build_encoder",
    "convolution",
    "convolve",
    "convolve_by_slabs",
    "convolve_rows",
    "crop_to",
    "encode_pair",
    "for_stacks",
    "interpolate_bias_tables",
    "is_large",
    "load_encoder_weights",
    "local_correlation",
    "normalize_and_activate",
    "pad_to_multiple",
    "paired_channels",
    "residual_by_slabs",
    "split_pair",
    "to_image_grid",
    "upsample_to",
    "vector_field_attention",
]
