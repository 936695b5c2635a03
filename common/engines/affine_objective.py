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
"""How alike two scans are under an affine map, with the derivatives of that; only their overlap counts.

Every measure is at most 1 (mutual information: unbounded) and is 0 for scans that have nothing in common. A part of the
fixed scan that leaves the moving one adds nothing, as if the two had nothing in common there: so losing overlap always
costs, and what lies outside is still never compared with invented values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from common.engines.affine_groups import box_corners, step_matrix
from common.engines.affine_pyramid import Level
from common.engines.mattes import mattes_information
from common.losses import LNCC, MSE, GlobalNCC
from common.spatial import affine_to_ddf, identity_grid, warp

__all__ = ["SIMILARITIES", "Objective"]

#: Names of the measures.
SIMILARITIES = ("lncc", "ncc", "mi", "mse")

_WINDOW = 5  # voxels of the level along the side of the windows of "lncc"
_EPS = 1e-3  # of its denominators, for images in [0, 1]


class Objective:
    """The similarity of a level's pair as a function of the map, and of steps from a map.

    Args:
        level: the pair.
        similarity: one of :data:`SIMILARITIES`.
    """

    def __init__(self, level: Level, similarity: str) -> None:
        self.level, self.similarity = level, similarity
        self.fixed, self.moving = level.fixed.image, level.moving.image
        shape = np.array(self.fixed.shape[2:])
        self.shape = tuple(int(n) for n in shape)
        self.affine = level.fixed.affine
        self.to_moving = np.linalg.inv(level.moving.affine)
        low, high = _extent(level.fixed.foreground)
        corners = box_corners(low, high) @ self.affine[:-1, :-1].T + self.affine[:-1, -1]
        self.centre = level.fixed.centre
        #: (2^d, d) in mm: the corners of the box around the fixed foreground.
        self.corners = corners
        #: mm, of the farthest corner from the centre of mass.
        self.radius = float(np.linalg.norm(corners - self.centre, axis=1).max())
        weight = level.fixed.foreground if level.fixed.mask is None else level.fixed.foreground * level.fixed.mask
        self.foreground = weight / weight.sum()
        self.whole = float(self.fixed.numel() if level.fixed.mask is None else level.fixed.mask.sum())
        self._prepare()

    def _prepare(self) -> None:
        """What depends on the fixed image alone."""
        mask = torch.ones_like(self.fixed) if self.level.fixed.mask is None else self.level.fixed.mask
        mean = (self.fixed * mask).sum() / self.whole
        self.energy = (self.fixed - mean) ** 2 * mask  # what "mse" can explain
        if self.similarity == "lncc":
            self.loss: LNCC | GlobalNCC | MSE = LNCC(_WINDOW, eps=_EPS, border="inside")
            variance = _local_variance(self.fixed)
            # How much of a window's correlation with itself the floor leaves.
            self.structure = float((variance**2 / (variance**2 + _EPS) * mask).sum())
            self.slope_weight = mask * variance / (variance**2 + _EPS)
        else:
            self.loss = MSE() if self.similarity == "mse" else GlobalNCC()

    def __call__(self, matrix: np.ndarray) -> float:
        """The similarity under a map (d+1, d+1), world of fixed to world of moving."""
        with torch.no_grad():
            return float(self._similarity(torch.from_numpy(self.to_moving @ matrix @ self.affine)))

    def overlap(self, matrix: np.ndarray) -> float:
        """The part of the fixed foreground that a map sends into the moving scan (and its mask)."""
        to_voxel = torch.from_numpy(self.to_moving @ matrix @ self.affine).float().to(self.fixed.device)
        mask = self._mask(affine_to_ddf(to_voxel, self.shape), to_voxel)
        return 1.0 if mask is None else min(1.0, float((mask * self.foreground).sum()))

    def loss_and_slope(self, matrix: np.ndarray, parameters: np.ndarray, basis: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the similarity after a step from a map, and its derivatives in the parameters of the step."""
        theta = torch.from_numpy(np.array(parameters)).requires_grad_()
        step = step_matrix(theta, torch.from_numpy(basis), torch.from_numpy(self.centre), self.radius)
        with torch.enable_grad():
            to_voxel = torch.from_numpy(self.to_moving @ matrix) @ step @ torch.from_numpy(self.affine)
            loss = -self._similarity(to_voxel)
        (slope,) = torch.autograd.grad(loss, theta)
        return float(loss.detach()), slope.numpy()

    def step(self, parameters: np.ndarray, basis: np.ndarray) -> np.ndarray:
        """The map (d+1, d+1) of a step, world of fixed to itself."""
        centre = torch.from_numpy(self.centre)
        return step_matrix(torch.from_numpy(parameters), torch.from_numpy(basis), centre, self.radius).numpy()

    def metric(self, basis: np.ndarray) -> np.ndarray:
        """An estimate (K, K) of the second derivatives of the loss near the best map: Gauss and Newton's.

        There the moved image is close to the fixed one, and the squared difference that all measures come down to has
        the second derivatives Σ (∇f·v)(∇f·w), where v and w are the velocities of two generators.
        """
        mask = self.level.fixed.mask
        weight = self.slope_weight if self.similarity == "lncc" else mask
        scale = 2.0 / (self.structure if self.similarity == "lncc" else float(self.energy.sum()))
        dims = len(self.shape)
        slopes = torch.stack([_central(self.fixed[0, 0], axis) for axis in range(dims)]).flatten(1)
        points = identity_grid(self.shape, device=self.fixed.device).flatten(1)
        # Of every pair of a slope and a coordinate (or 1), in voxels about the centre, one row.
        middle = np.linalg.solve(self.affine[:-1, :-1], self.centre - self.affine[:-1, -1])
        points = points - torch.from_numpy(middle).to(points).unsqueeze(1)
        rows = torch.cat([(slopes.unsqueeze(1) * points).flatten(0, 1), slopes])
        weighted = rows if weight is None else rows * weight.flatten()
        moments = (weighted @ rows.T).double().cpu().numpy()
        linear = self.affine[:-1, :-1]
        velocities = []
        for generator in basis:
            inner = np.linalg.solve(linear, generator[:dims, :dims] @ linear)
            shift = np.linalg.solve(linear, generator[:dims, dims] * self.radius)
            velocities.append(np.concatenate([inner.flatten(), shift]))
        jacobian = np.stack(velocities)
        metric = scale * jacobian @ moments @ jacobian.T
        # Directions in which the image is the same all over, such as around a ball, still need some stiffness.
        return np.asarray(metric + np.eye(len(basis)) * (1e-3 * np.trace(metric) / len(basis) + 1e-12))

    def motion(self, basis: np.ndarray, parameters: np.ndarray) -> float:
        """How far a step moves the corners of the fixed foreground, in mm, to first order."""
        generator = np.tensordot(parameters, basis, 1)[:-1]
        points = np.concatenate([(self.corners - self.centre) / self.radius, np.ones((len(self.corners), 1))], axis=1)
        return float(np.linalg.norm(points @ generator.T, axis=1).max()) * self.radius

    def _similarity(self, to_voxel: Tensor) -> Tensor:
        to_voxel = to_voxel.float().to(self.fixed.device)
        ddf = affine_to_ddf(to_voxel, self.shape)
        moved = warp(self.moving, ddf)
        mask = self._mask(ddf.detach(), to_voxel.detach())
        overlap = 1.0 if mask is None else (mask * self.foreground).sum().clamp_max(1.0)
        if self.similarity == "mi":
            return mattes_information(moved, self.fixed, mask) * overlap
        if self.similarity == "mse":
            inside = self.whole if mask is None else mask.sum()
            energy = self.energy.sum() if mask is None else (self.energy * (mask > 0)).sum()
            return (energy - self.loss(moved, self.fixed, mask) * inside) / self.energy.sum()
        if self.similarity == "lncc":
            inside = self.whole if mask is None else mask.sum()
            return -self.loss(moved, self.fixed, mask) * inside / self.structure
        return -self.loss(moved, self.fixed, mask) * overlap

    def _mask(self, ddf: Tensor, to_voxel: Tensor) -> Tensor | None:
        """Where the fixed voxels (1, 1, *S) fall into the moving scan and both masks; None for everywhere."""
        size = np.array(self.moving.shape[2:])
        ends = box_corners(np.zeros(len(size)), np.array(self.shape) - 1.0)
        matrix = to_voxel.double().cpu().numpy()
        reached = ends @ matrix[:-1, :-1].T + matrix[:-1, -1]
        mask = self.level.fixed.mask
        if np.any(reached < -0.5) or np.any(reached > size - 0.5):
            inside = torch.ones((1, 1, *self.shape), dtype=torch.bool, device=ddf.device)
            for axis, count in enumerate(size):
                steps = torch.arange(self.shape[axis], device=ddf.device, dtype=ddf.dtype)
                position = ddf[:, axis : axis + 1] + steps.view([-1 if k == axis else 1 for k in range(len(size))])
                inside &= (position >= -0.5) & (position <= float(count) - 0.5)
            mask = inside.float() if mask is None else mask * inside
        if self.level.moving.mask is not None:
            landed = warp(self.level.moving.mask, ddf, padding="zeros")
            mask = landed if mask is None else mask * landed
        return mask


def _central(image: Tensor, axis: int) -> Tensor:
    """Central differences, 0 across the border, per voxel."""
    slope = torch.zeros_like(image)
    count = image.shape[axis]
    if count > 2:
        ahead, behind = image.narrow(axis, 2, count - 2), image.narrow(axis, 0, count - 2)
        slope.narrow(axis, 1, count - 2).copy_((ahead - behind) / 2)
    return slope


def _local_variance(image: Tensor) -> Tensor:
    """The variance in the windows of "lncc", of what of them lies in the image."""
    pool = avg_pool2d if image.dim() == 4 else avg_pool3d
    centred = image - image.mean()
    mean, square = (
        pool(values, _WINDOW, stride=1, padding=_WINDOW // 2, count_include_pad=False)
        for values in (centred, centred * centred)
    )
    return (square - mean * mean).clamp_min_(0.0)


def _extent(foreground: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel of the foreground along each axis."""
    where = foreground[0, 0].nonzero()
    return where.amin(0).double().cpu().numpy(), where.amax(0).double().cpu().numpy()
