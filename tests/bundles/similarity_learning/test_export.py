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
"""What of variational registration can be recorded: the similarity and VoxelMorph, but not the fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bundles.similarity_learning.scripts.network import VariationalRegistration
from bundles.similarity_learning.scripts.similarity import Similarity
from bundles.similarity_learning.scripts.voxelmorph import PublishedVoxelMorph


class _Map(nn.Module):
    """The learnt similarity of a pair at each voxel."""

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__()
        self.similarity = Similarity(kind, learnt=True, spatial_dims=dims)

    def forward(self, image: Tensor) -> Tensor:
        moved, fixed = image.chunk(2, dim=1)
        return self.similarity.map(self.similarity.reference(fixed), moved)


@pytest.mark.parametrize(("kind", "size"), [("ssd", (12, 14, 9)), ("lcc", (19, 22))])
def test_a_learnt_similarity_can_be_exported(kind: str, size: tuple[int, ...]) -> None:
    module, image = _Map(kind, len(size)).eval(), torch.rand(1, 2, *size)
    with torch.no_grad():
        program = torch.export.export(module, (torch.rand_like(image),)).module()
        torch.testing.assert_close(program(image), module(image), rtol=0, atol=1e-5)


def test_an_exported_voxelmorph_takes_any_size() -> None:
    network = PublishedVoxelMorph(2, integration_steps=3).eval()
    nn.init.normal_(network.head.conv.weight, std=0.1)
    axes = {2 + axis: torch.export.Dim(f"size{axis}", min=33, max=1024) for axis in range(2)}
    first = torch.rand(1, 2, 35, 38)
    with torch.no_grad():
        program = torch.export.export(network, (first,), dynamic_shapes=(axes,)).module()
        for image in (first, torch.rand(1, 2, 48, 33)):
            expected = network(image)
            assert expected.abs().max() > 1e-2
            torch.testing.assert_close(program(image), expected, rtol=0, atol=5e-5)


def test_a_fit_says_that_it_cannot_be_exported() -> None:
    network = VariationalRegistration(2, iterations=1, samples=0).eval()
    with pytest.raises(NotImplementedError, match="no fixed sequence of operations"):
        torch.export.export(network, (torch.rand(1, 2, 16, 16),))
