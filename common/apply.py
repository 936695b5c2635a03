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
"""Carry images, label maps, probability maps and points through a registration's transform, in one interpolation.

``docs/directions.md`` shows which way each of them goes, with numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.command_line import require_device
from common.io import Scan, grid_of, load_image, load_series, load_transforms, save_image, save_series
from common.io.points import from_ras, load_points, save_points, to_ras
from common.spatial import Grid, SpatialTransform, outside_value, warp, warp_labels, warp_scan

__all__ = ["KINDS", "apply", "apply_to_image", "apply_to_points"]

logger = logging.getLogger(__name__)

KINDS = ("image", "label", "label_nearest", "probability")
_STEPS = 50
_ARRIVED, _MISSED = 1e-4, 0.01  # mm: where a search for a point ends, and what is worth a warning
_SHOWN = 5


def apply(
    transform: str | Sequence[str],
    output: str,
    moving: str | None = None,
    fixed: str | None = None,
    points: str | None = None,
    kind: str = "image",
    space: str = "ras",
    of: str = "fixed",
    inverse: bool = False,
    fill: float | None = None,
    device: str | None = None,
) -> None:
    """Carry an image or points through transforms, in one interpolation.

    ``python -m common apply --transform transform.h5 --moving scan.nii.gz --fixed ref.nii.gz --output moved.nii.gz``
    ``python -m common apply --transform transform.h5 --points landmarks.csv --of fixed --output partners.csv``

    A transform says for every point of the fixed image which point of the moving image belongs to it::

                           transform T
          fixed image   ---------------->   moving image
            a point x                         its partner T(x)

          images of the moving one  <----   pulled against the arrow: moved(x) = moving(T(x))
          points of the fixed one   ---->   along the arrow (--of fixed)
          points of the moving one  <----   back along the inverse of T (--of moving)

    Args:
        transform: a file, or several as antsApplyTransforms takes them, warp before affine map (the first one acts
            first on a point of the fixed image): ITK and ANTs fields (.nii.gz) and transforms (.h5 .tfm .txt .mat),
            FSL's FLIRT matrices, Learn2Reg's fields. ``name:inverse`` inverts one of them.
        output: .nii.gz for an image, .csv for points.
        moving: the image to carry. With ``points``: the moving image, where voxels or the transform's form ask for it.
        fixed: the image whose grid the result lies on; any grid will do.
        points: a CSV with columns x, y, z, or bare numbers.
        kind: of the image: ``image`` (linear), ``label`` (the label with the greatest interpolated share),
            ``label_nearest``, ``probability`` (every frame of a series, linear; the frames keep adding up to 1).
        space: of the points, coming and going: ``voxel``, ``ras`` or ``lps`` (mm).
        of: which image the points lie in; points of the fixed image go along the transform, those of the moving image
            back along its inverse.
        inverse: turn the transform around, numerically where it is a field.
        fill: what lies outside of the image. Default: 0, or the image's lowest value if that is negative (CT).
        device: ``cpu`` or ``cuda``. Default: a GPU if there is one.

    Raises:
        FileNotFoundError, ScanError, TransformError, PointsError: name the file and what is wrong with it.
        ValueError: for options that do not go together.
    """
    if moving is None and points is None:
        raise ValueError("nothing to carry: give --moving, an image, or --points, a CSV")
    if kind not in KINDS:
        raise ValueError(f"unknown --kind '{kind}', expected one of {list(KINDS)}")
    if of not in ("fixed", "moving"):
        raise ValueError(f"--of must be 'fixed' or 'moving', got '{of}'")
    require_device(device)
    paths = [transform] if isinstance(transform, str) else list(transform)
    if points is not None:
        # The images are only asked where they lie.
        grids = tuple(None if name is None else grid_of(load_image(name)) for name in (fixed, moving))
        found = _load(paths, grids, inverse)
        _carry_points(points, found, grids, space, of, output)
    elif fixed is None or moving is None:
        raise ValueError("--fixed names the image whose grid the result lies on: give it too")
    else:
        _carry_image(paths, moving, fixed, kind, inverse, fill, device, output)
    logger.info("wrote %s", output)


def apply_to_image(
    image: Tensor, transform: SpatialTransform, fixed: Grid, moving: Grid, kind: str = "image", fill: float = 0.0
) -> Tensor:
    """Pull an image back, in one interpolation.

    Args:
        image: (C, *Sm) on the grid ``moving``; integers for labels.
        transform: from ``fixed`` to ``moving``.
        fixed: the grid of the result.
        moving: the grid of the image.
        kind: one of :data:`KINDS`.
        fill: the value outside of the image; labels have 0 there.

    Returns:
        (C, *fixed.shape).
    """
    ddf = transform.ddf(fixed, moving).to(image.device)
    if kind == "label":
        return warp_labels(image[None], ddf, padding="zeros")[0]
    if kind == "label_nearest":
        return warp(image[None], ddf, mode="nearest", padding="zeros")[0]
    if kind == "probability":
        moved = warp(image[None], ddf, padding="zeros")[0]
        if len(image) > 1:  # what comes from outside belongs to the first class, the background
            moved[:1] += 1 - warp(torch.ones_like(image[None, :1]), ddf, padding="zeros")[0]
        return moved
    return warp_scan(image[None], ddf, fill)[0]


def apply_to_points(points: Tensor, transform: SpatialTransform, of: str = "fixed") -> Tensor:
    """The partners (N, d) of points (N, d), RAS mm, of the fixed or of the moving image.

    Warns:
        UserWarning: for points of the moving image whose partners are not found, as where the transform folds.
    """
    return transform.points(points) if of == "fixed" else _sources(points, transform)


def _sources(points: Tensor, transform: SpatialTransform) -> Tensor:
    """The points that a transform takes to given ones, (N, d) both.

    An inverse field has values in voxels and is interpolated between them. It serves as the start here, and then to
    turn what is still missing at each point into a step, until the transform itself arrives.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of voxels that no point asks for
        inverse = transform.inverse()[0]
    start = inverse.points(points)
    found, best = start, start
    least = torch.full_like(points[:, 0], torch.inf)
    for _ in range(_STEPS):
        arrived = transform.points(found)
        missed = torch.linalg.vector_norm(arrived - points, dim=1)
        best = torch.where((missed < least)[:, None], found, best)
        least = torch.minimum(missed, least)
        if bool((least < _ARRIVED).all()):
            break
        found = found + start - inverse.points(arrived)
    away = [int(row) for row in torch.nonzero(least > _MISSED).flatten()]
    if away:
        warnings.warn(
            f"{len(away)} of {len(points)} points of the moving image could not be followed back, as where a transform "
            f"folds: their partners are only near, up to {float(least.max()):.2g} mm off, in rows "
            f"{[row + 1 for row in away[:_SHOWN]]}",
            stacklevel=3,
        )
    return best


def _load(paths: Sequence[str], grids: tuple[Grid | None, ...], inverse: bool) -> SpatialTransform:
    """The transform; turned around, its files are about the two images the other way round."""
    fixed, moving = reversed(grids) if inverse else grids
    found = load_transforms(paths, fixed=fixed, moving=moving)
    if not inverse:
        return found
    turned, residual = found.inverse()
    logger.info("inverted: there and back ends within %.3g mm of where it began", residual)
    return turned


def _carry_image(
    paths: Sequence[str],
    moving: str,
    fixed: str,
    kind: str,
    inverse: bool,
    fill: float | None,
    device: str | None,
    output: str,
) -> None:
    target = load_series(fixed)[0]  # only its grid is asked for, which all frames of a series share
    scans = load_series(moving) if kind == "probability" else [load_image(moving)]
    grids = grid_of(target), grid_of(scans[0])
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    image = torch.from_numpy(_stacked(scans, kind)).to(place)
    outside = fill if fill is not None else outside_value(image)
    moved = apply_to_image(image, _load(paths, grids, inverse), *grids, kind=kind, fill=outside).cpu().numpy()
    if kind == "probability" and len(moved) > 1:
        save_series(output, list(moved), target.affine_3d)
    else:
        save_image(output, moved[0].astype(scans[0].array.dtype) if "label" in kind else moved[0], target.affine_3d)


def _stacked(scans: Sequence[Scan], kind: str) -> np.ndarray:
    """(C, *S) float32, or int32 for labels."""
    arrays = np.stack([scan.array for scan in scans])
    if "label" not in kind:
        return arrays.astype(np.float32)
    if not np.array_equal(arrays, np.round(arrays)):
        raise ValueError(f"{scans[0].path} must hold whole numbers to be carried as --kind {kind}; is it an image?")
    return arrays.astype(np.int32)


def _carry_points(
    path: str, transform: SpatialTransform, grids: tuple[Grid | None, ...], space: str, of: str, output: str
) -> None:
    table = load_points(path, transform.spatial_dims)
    source, target = grids if of == "fixed" else tuple(reversed(grids))
    partners = apply_to_points(to_ras(table.coordinates, space, source), transform, of)
    save_points(output, table, from_ras(partners, space, target))
