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
"""How smooth and how invertible a displacement field is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from common.metrics.base import RegistrationMetric, check_definition
from common.spatial import jacobian_determinant, non_diffeomorphic_volume

__all__ = ["MeanJacobian", "NonDiffeomorphicVolumePercent", "NonPositiveJacobianPercent", "StdLogJacobian"]

_SLAB_VOXELS = 2**19


def _interior(values: Tensor, crop: int, spatial_dims: int) -> Tensor:
    """Leave out ``crop`` voxels at both ends of the last ``spatial_dims`` axes."""
    sizes = tuple(values.shape[-spatial_dims:])
    if min(sizes) <= 2 * crop:
        raise ValueError(f"a field of size {sizes} has no voxel that is {crop} or more from its edge")
    inner = (slice(crop, n - crop) for n in sizes)
    return values[(..., *inner)]


def _check_field(ddf: Tensor) -> None:
    if ddf.ndim not in (4, 5) or ddf.shape[1] != ddf.ndim - 2:
        raise ValueError(f"ddf must be (B, d, *S) with d = 2 or 3 spatial axes, got {tuple(ddf.shape)}")


def _slabs(ddf: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows along the first spatial axis, about ``_SLAB_VOXELS`` each.

    Determinants are taken in float64, since those near 0 decide what counts as folded, and the nine derivatives of a
    whole brain would need gigabytes.
    """
    rows = max(1, _SLAB_VOXELS // max(1, ddf[0, 0, 0].numel()))
    for start in range(0, ddf.shape[2], rows):
        yield start, min(start + rows, ddf.shape[2])


def _determinant(ddf: Tensor) -> Tensor:
    """The Jacobian determinant (B, \\*S) by central differences, float64."""
    parts = []
    for start, stop in _slabs(ddf):
        first = max(start - 1, 0)
        slab = jacobian_determinant(ddf[:, :, first : stop + 1].double())
        parts.append(slab[:, start - first : stop - first])
    return torch.cat(parts, 1)


def _folded_volume(ddf: Tensor, mask: Tensor) -> Tensor:
    """:func:`common.spatial.non_diffeomorphic_volume` of inner voxels, float64 (B,)."""
    total = torch.zeros(ddf.shape[0], dtype=torch.float64, device=ddf.device)
    for start, stop in _slabs(ddf[:, :, 1:-1]):
        # Rows 1 + start ... 1 + stop of the grid, with a neighbour on both sides.
        rows = slice(start, stop + 2)
        total = total + non_diffeomorphic_volume(ddf[:, :, rows].double(), mask[:, rows])
    return total


def _inside(mask: Tensor | None, ddf: Tensor) -> Tensor:
    """The mask as booleans (B, \\*S); all of the grid when there is none."""
    shape = (ddf.shape[0], *ddf.shape[2:])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=ddf.device)
    if tuple(mask.shape) != (ddf.shape[0], 1, *ddf.shape[2:]):
        raise ValueError(f"the mask must be (B, 1, *S) on the field's grid {shape}, got {tuple(mask.shape)}")
    return mask[:, 0] > 0


def _deviation(values: Tensor) -> Tensor:
    """Population standard deviation; NaN of nothing."""
    return values.std(unbiased=False) if len(values) else values.new_tensor(float("nan"))


class StdLogJacobian(RegistrationMetric):
    """Standard deviation over voxels of the logarithm of the Jacobian determinant of ``x + ddf(x)``, per item.

    Central differences, ``crop`` voxels left out at each edge, population deviation. ``definition="standard"`` takes
    ``log(clip(det, 1e-9, 1e9))``; ``"learn2reg"`` adds 3 to the determinant before clipping, as the challenge's
    evaluation does: its numbers are much smaller and hide folds with a determinant above -3.

    Args:
        definition: ``"standard"`` or ``"learn2reg"``.
        crop: voxels left out at each edge; 2 in the challenge.
    """

    def __init__(self, definition: str = "standard", crop: int = 2) -> None:
        super().__init__()
        self.definition = check_definition(definition)
        self.crop = crop

    def _compute_tensor(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        _check_field(ddf)
        determinant = _interior(_determinant(ddf), self.crop, ddf.ndim - 2)
        offset = 3.0 if self.definition == "learn2reg" else 0.0
        logarithm = (determinant + offset).clamp(1e-9, 1e9).log()
        inside = _interior(_inside(mask, ddf), self.crop, ddf.ndim - 2)
        return torch.stack([_deviation(v[m]) for v, m in zip(logarithm, inside, strict=True)])[:, None].float()


class MeanJacobian(RegistrationMetric):
    """Mean over voxels of the Jacobian determinant of ``x + ddf(x)`` (central differences), per item.

    1 for a field that moves what is inside and nothing at the edge of the image, whatever it does there.

    Args:
        crop: voxels left out at each edge.
    """

    def __init__(self, crop: int = 1) -> None:
        super().__init__()
        self.crop = crop

    def _compute_tensor(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        _check_field(ddf)
        determinant = _interior(_determinant(ddf), self.crop, ddf.ndim - 2)
        inside = _interior(_inside(mask, ddf), self.crop, ddf.ndim - 2)
        return ((determinant * inside).flatten(1).sum(1) / inside.flatten(1).sum(1))[:, None].float()


class NonPositiveJacobianPercent(RegistrationMetric):
    """Percentage of voxels whose Jacobian determinant (central differences) is not positive, per item.

    The folding measure of most papers. It misses folds between the samples of the central difference:
    :class:`NonDiffeomorphicVolumePercent` does not.

    Args:
        crop: voxels left out at each edge.
    """

    def __init__(self, crop: int = 1) -> None:
        super().__init__()
        self.crop = crop

    def _compute_tensor(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        _check_field(ddf)
        folded = _interior(_determinant(ddf) <= 0, self.crop, ddf.ndim - 2)
        inside = _interior(_inside(mask, ddf), self.crop, ddf.ndim - 2)
        return (100.0 * (folded & inside).flatten(1).sum(1) / inside.flatten(1).sum(1))[:, None].float()


class NonDiffeomorphicVolumePercent(RegistrationMetric):
    """Volume that the piecewise linear field turns inside out, in percent of the masked volume, per item.

    Digital diffeomorphisms (Liu et al., IJCV 2024, "On finite difference Jacobian computation in deformable image
    registration"): in 3-D the negative parts of ten tetrahedra per voxel, halved and divided by six.

    Args:
        definition: which image says where to look, its voxels above 0. ``"standard"``: the mask or image on the fixed
            grid, where the field lives, or everything without one. ``"learn2reg"``: the challenge's mask is the
            *moving* image, which must then be given.
    """

    def __init__(self, definition: str = "standard") -> None:
        super().__init__()
        self.definition = check_definition(definition)

    def _compute_tensor(self, ddf: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if mask is None and self.definition == "learn2reg":
            raise ValueError(
                "definition='learn2reg' measures where the moving image is above 0: give that as 2nd input"
            )
        _check_field(ddf)
        inside = _inside(mask, ddf)
        count = _interior(inside, 1, ddf.ndim - 2).flatten(1).sum(1)
        return (100.0 * _folded_volume(ddf, inside) / count)[:, None].float()
