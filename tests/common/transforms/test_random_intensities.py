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
"""Intensities of random images."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter

from common.transforms.random_intensities import bias_field, blur, intensity_tables, look_up, rescale_intensity
from common.transforms.random_stream import RandomStream


def test_tables() -> None:
    mono = intensity_tables(RandomStream([0, 1]), 16, 0.0)
    multi = intensity_tables(RandomStream([0, 1]), 16, 1.0)
    assert mono.shape == (2, 2, 17)
    assert not bool(mono[..., 0].any())
    assert mono[..., 1:].min() >= 25 / 255
    assert mono.max() < 225 / 255
    assert torch.equal(mono[:, 0], mono[:, 1])
    assert torch.equal(mono[:, 0], multi[:, 0])
    assert not torch.equal(multi[:, 0], multi[:, 1])


def test_look_up() -> None:
    labels = torch.tensor([[[0, 2]], [[1, 1]]], dtype=torch.uint8).unsqueeze(1)
    table = torch.tensor([[0.0, 0.1, 0.2], [0.0, 0.5, 0.6]])
    assert torch.allclose(look_up(table, labels).flatten(), torch.tensor([0.0, 0.2, 0.5, 0.5]))


@pytest.mark.parametrize("size", [(24, 20), (14, 12, 13)])
def test_blur_is_scipys(size: tuple[int, ...]) -> None:
    images = torch.rand(2, 2, *size)
    sigma = torch.tensor([[0.0, 1.0], [1.5, 0.7]])
    blurred = blur(images, sigma)
    for b, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
        radius = 5  # ceil(3 * 1.5), the widest of the batch
        expected = gaussian_filter(images[b, c].numpy(), float(sigma[b, c]) or 1e-6, mode="nearest", radius=radius)
        assert torch.allclose(blurred[b, c], torch.from_numpy(expected), atol=1e-5)


def test_bias_field_is_smooth_positive_and_as_strong_as_asked() -> None:
    factors = bias_field(RandomStream([0, 1, 2]), (32, 32, 32), torch.tensor([[0.0, 0.5]] * 3))
    assert torch.equal(factors[:, 0], torch.ones(3, 32, 32, 32))
    logs = factors[:, 1].log()
    assert 0.15 < float(logs.abs().max()) < 0.75
    assert float(logs.diff(dim=1).abs().max()) < 0.1


def test_rescale() -> None:
    images = torch.tensor([[[[1.0, 3.0]], [[3.0, 5.0]]]])
    assert rescale_intensity(images, torch.tensor([False])).flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert rescale_intensity(images, torch.tensor([True])).flatten().tolist() == [0.0, 0.5, 0.5, 1.0]
    constant = rescale_intensity(torch.full((1, 2, 3, 3), 0.7), torch.tensor([False]))
    assert not bool(constant.any())
