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
"""The similarity as the data term of a network's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from common.handlers import CheckpointError, load_checkpoint

from .similarity import Similarity

__all__ = ["SimilarityLoss", "load_similarity"]

_PREFIX = "similarity."


def load_similarity(path: str | Path, similarity: Similarity) -> None:
    """Load a learnt similarity from a checkpoint of ``VariationalRegistration``, or from a ``last.pt`` of its training.

    Raises:
        FileNotFoundError, CheckpointError: when there is no such file, or its weights are of another similarity.
    """
    content = load_checkpoint(path)
    state = content["model"] if isinstance(content.get("model"), dict) else content
    weights = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
    expected = similarity.state_dict()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != {name: tuple(value.shape) for name, value in expected.items()}:
        raise CheckpointError(
            f"{path} holds no similarity of this kind: it has {sorted(shapes) or sorted(state)[:5]}, and "
            f"{sorted(expected)} is expected, with the same kind, channels, window and number of axes"
        )
    similarity.load_state_dict(weights)


class SimilarityLoss(nn.Module):
    """How unlike the fixed image the moved one is, a voxel: a baseline or a learnt similarity whose weights stay.

    The mean over images of their energy (half of the squared difference, or minus the local correlation) divided by
    the number of voxels that count.

    Args:
        kind: "ssd" or "lcc".
        learnt: compare maps that a network makes of both images.
        checkpoint: of a learnt similarity; without one it is untrained, which is the baseline but for rounding.
        spatial_dims: 2 or 3.
        channels: of the network.
        window: half-width of the box of "lcc".
        train_lcc_kernel: the checkpoint holds weights of that box.

    Raises:
        ValueError: for a checkpoint of a similarity that is not learnt.
        FileNotFoundError, CheckpointError: see :func:`load_similarity`.
    """

    def __init__(
        self,
        kind: str = "ssd",
        learnt: bool = False,
        checkpoint: str | Path | None = None,
        spatial_dims: int = 3,
        channels: Sequence[int] = (4, 8, 8),
        window: int = 1,
        train_lcc_kernel: bool = False,
    ) -> None:
        super().__init__()
        if checkpoint and not learnt:
            raise ValueError(f"SimilarityLoss: the checkpoint {checkpoint} has no effect unless learnt is true")
        self.similarity = Similarity(kind, learnt, spatial_dims, channels, window, train_lcc_kernel, normalised=True)
        if checkpoint:
            load_similarity(checkpoint, self.similarity)
        self.requires_grad_(False)

    def forward(self, moved: Tensor, fixed: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, one number.

        Args:
            moved: (B, 1, *S).
            fixed: (B, 1, *S).
            mask: (B, 1, *S), the voxels of the fixed images that count; None for all.
        """
        energy = self.similarity.energy(self.similarity.reference(fixed, mask), moved)
        return energy.mean()
