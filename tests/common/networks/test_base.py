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
from monai.data import MetaTensor
from torch import Tensor

from common.networks import (
    Encoder,
    RegistrationNetwork,
    VFAEncoder,
    VoxelMorphEncoder,
    as_tuple,
    average_pool,
    crop_to,
    encode_pair,
    pad_to_multiple,
    paired_channels,
    split_pair,
    to_image_grid,
)


class _Doubling(Encoder):
    """One map: twice the image."""

    def __init__(self, pairing: str) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.feature_channels, self.strides = 2, 1, (1,), (1,)
        self.pairing = pairing  # type: ignore[assignment]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * x]


def test_padding_repeats_the_last_voxel_and_cropping_takes_it_away() -> None:
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    padded = pad_to_multiple(image, (4, 4))
    expected = torch.tensor([[1.0, 2, 3, 3], [4, 5, 6, 6], [4, 5, 6, 6], [4, 5, 6, 6]])
    torch.testing.assert_close(padded[0, 0], expected)
    torch.testing.assert_close(crop_to(padded, (2, 3)), image)


def test_padding_more_than_the_image_and_only_where_needed() -> None:
    assert pad_to_multiple(torch.rand(1, 2, 3, 8, 17), 8).shape == (1, 2, 8, 8, 24)
    image = torch.rand(1, 2, 8, 16)
    assert pad_to_multiple(image, 8) is image


def test_split_pair_keeps_moving_first() -> None:
    image = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    moving, fixed = split_pair(image, 2)
    assert moving[0, :, 0, 0].tolist() == [0, 1]
    assert fixed[0, :, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 2, 8, 8), "3-D network"), ((1, 3, 8, 8, 8), "3 channels"), ((1, 0, 8, 8, 8), "0 channels")],
)
def test_a_wrong_pair_is_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_pair(torch.zeros(shape), 3)


def test_a_network_takes_pairs_with_metadata_and_low_precision() -> None:
    network = RegistrationNetwork(2)
    padded = network.padded(MetaTensor(torch.rand(1, 2, 5, 8)).to(torch.bfloat16), 4)
    assert type(padded) is Tensor
    assert padded.dtype == torch.float32
    assert padded.shape == (1, 2, 8, 8)


def test_a_network_has_two_or_three_axes() -> None:
    with pytest.raises(ValueError, match="2 or 3, got 4"):
        RegistrationNetwork(4)


def test_average_pool_by_hand_and_by_axis() -> None:
    image = torch.arange(8.0).view(1, 1, 2, 4)
    torch.testing.assert_close(average_pool(image, 2)[0, 0], torch.tensor([[2.5, 4.5]]))
    torch.testing.assert_close(average_pool(image, (1, 2))[0, 0], torch.tensor([[0.5, 2.5], [4.5, 6.5]]))
    assert average_pool(image, 1) is image


@pytest.mark.parametrize("value", [0, (2, 2), (1, 0, 1)])
def test_as_tuple_refuses(value: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="window needs"):
        as_tuple(value, 3, "window")


def test_to_image_grid_rescales_displacements_and_aligns_areas() -> None:
    # A field that is linear in the position stays that line, inside: coarse voxel i is centred on image voxel 2i + 0.5.
    coarse = torch.zeros(1, 2, 8, 4)
    coarse[:, 0] = torch.arange(8.0).view(8, 1)
    image = to_image_grid(coarse.to(torch.bfloat16), (16, 8))
    assert image.dtype == torch.float32
    expected = 2 * (torch.arange(1.0, 15.0) - 0.5) / 2
    torch.testing.assert_close(image[0, 0, 1:15, 3], expected)
    assert torch.count_nonzero(image[0, 1]) == 0


def test_a_separate_encoder_is_applied_to_each_image_and_keeps_their_order() -> None:
    image = torch.rand(3, 2, 4, 4)
    torch.testing.assert_close(encode_pair(_Doubling("separate"), image)[0], 2 * image)
    assert paired_channels(_Doubling("separate")) == (2,)
    assert paired_channels(_Doubling("joint")) == (1,)


def test_features_of_a_pair_tell_which_image_moves() -> None:
    image = torch.rand(1, 2, 16, 16)
    encoder = VFAEncoder(2, start_channels=2, max_channels=4, downsamples=2)
    for there, back in zip(encode_pair(encoder, image), encode_pair(encoder, image.flip(1)), strict=True):
        half = there.shape[1] // 2
        torch.testing.assert_close(there[:, :half], back[:, half:])
        assert (there - back).abs().max() > 1e-3


@pytest.mark.parametrize("encoder", [VFAEncoder(2, downsamples=3), VoxelMorphEncoder(2)])
def test_paired_channels_are_those_of_the_maps(encoder: Encoder) -> None:
    maps = encode_pair(encoder, torch.rand(2, 2, 32, 16))
    assert tuple(m.shape[1] for m in maps) == paired_channels(encoder)
    assert [m.shape[2:] for m in maps] == [(32 // s, 16 // s) for s in encoder.strides]
    assert all(m.shape[0] == 2 for m in maps)
