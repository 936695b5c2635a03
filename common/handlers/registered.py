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
"""A registered pair as its files have it: fields and transforms between their own grids."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from common.io import grid_of, load_image
from common.io.label_maps import load_label_map
from common.spatial import Grid, SpatialTransform, affine_to_ddf, warp
from common.spatial.world import field_on_grid

__all__ = ["RegisteredPair"]


class RegisteredPair:
    """One pair of an evaluator's output, carried from the grids that the network saw to those of the files.

    Args:
        pair: the files: ``moving`` and ``fixed``, ``moving_label`` where there is one; ``moving_frame`` and
            ``fixed_frame`` of 4-D files.
        output: of the evaluator, for a batch: ``ddf`` (B, d, \\*S), ``fixed_affine`` and ``moving_affine``
            (B, d+1, d+1) from voxels of what the network saw to the world of each file, RAS mm; optionally
            ``inverse_ddf`` (B, d, \\*S), and ``affine_matrix`` (B, d+1, d+1), the alignment that came before the
            network, from the fixed world to the moving one.
        item: which of the batch.

    Attributes:
        moving, fixed: the scans.
        ddf: (1, d, \\*S) the whole motion, from voxels of the fixed file to voxels of the moving one.
    """

    def __init__(self, pair: Mapping[str, Any], output: Mapping[str, Any], item: int) -> None:
        self.pair, self.output, self.item = pair, output, item
        self.moving, self.fixed = (load_image(pair[role], pair.get(f"{role}_frame")) for role in ("moving", "fixed"))
        self.ddf = self.on_files(output["ddf"][item : item + 1])

    def label(self, role: str) -> Tensor | None:
        """(1, 1, \\*S) int32, the label map of a scan, ``moving`` or ``fixed``, if the pair names one."""
        path = self.pair.get(f"{role}_label")
        if not path:
            return None
        array = load_label_map(path, self.pair.get(f"{role}_frame")).array
        return torch.from_numpy(array.astype("int32"))[None, None].to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the fields are."""
        return self.ddf.device

    @cached_property
    def moving_grid(self) -> Grid:
        """Of the moving file."""
        return grid_of(self.moving)

    @cached_property
    def fixed_grid(self) -> Grid:
        """Of the fixed file."""
        return grid_of(self.fixed)

    @cached_property
    def matrix(self) -> Tensor:
        """(d+1, d+1) float64, from the fixed world to the moving one: how the scans lay when the network met them.

        An alignment that was found or given before; without one, what brings the grids that the network saw together,
        which moves nothing where both files lie in one world.
        """
        known = self.output.get("affine_matrix")
        if known is not None:
            return torch.as_tensor(known[self.item]).double().cpu()
        fixed, moving = (self.output[f"{role}_affine"][self.item].double().cpu() for role in ("fixed", "moving"))
        return moving @ torch.linalg.inv(fixed)

    @cached_property
    def affine_part(self) -> Tensor | None:
        """:attr:`matrix` where it moves anything."""
        identity = torch.eye(len(self.matrix), dtype=torch.float64)
        return None if torch.allclose(self.matrix, identity, rtol=0, atol=1e-4) else self.matrix

    def start(self) -> Tensor:
        """(1, d, \\*S) :attr:`ddf` as it was before the network."""
        to_moving = torch.linalg.solve(self.moving_grid.affine, self.matrix @ self.fixed_grid.affine)
        return affine_to_ddf(to_moving.float(), self.fixed_grid.shape).to(self.device)

    def transform(self) -> SpatialTransform:
        """The whole motion in RAS mm: what the network found, on the fixed file's grid, and then the affine map."""
        return SpatialTransform.from_ddf(self.ddf, self.fixed_grid, self.moving_grid, self.affine_part)

    def inverse_transform(self, inverse_ddf: Tensor) -> SpatialTransform:
        """The same of a field (1, d, \\*S) from voxels of the moving file to those of the fixed one."""
        back = None if self.affine_part is None else torch.linalg.inv(self.affine_part)
        return SpatialTransform.from_ddf(inverse_ddf, self.moving_grid, self.fixed_grid, back)

    def inverse_ddf(self) -> Tensor | None:
        """(1, d, \\*S) from voxels of the moving file to those of the fixed one, where the network gives an inverse."""
        seen = self.output.get("inverse_ddf")
        if seen is None:
            return None
        fixed, moving = self._seen
        grids = self.moving_grid.shape, self.moving_grid.affine, self.fixed_grid.affine
        return field_on_grid(seen[self.item : self.item + 1], moving, fixed, *grids)

    def on_files(self, seen: Tensor) -> Tensor:
        """A field (1, d, \\*S) that the network gave, on the grids of the files."""
        return field_on_grid(seen, *self._seen, self.fixed_grid.shape, self.fixed_grid.affine, self.moving_grid.affine)

    def map_on_file(self, seen: Tensor) -> Tensor:
        """A map (1, C, \\*S) on the fixed image that the network saw, on the grid of the fixed file."""
        to_seen = torch.linalg.solve(self._seen[0].double().cpu(), self.fixed_grid.affine)
        return warp(seen.float(), affine_to_ddf(to_seen.float(), self.fixed_grid.shape).to(seen.device))

    @property
    def _seen(self) -> tuple[Tensor, Tensor]:
        return self.output["fixed_affine"][self.item], self.output["moving_affine"][self.item]
