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
"""The files that a registered pair leaves, one function for each kind."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.handlers.registered import RegisteredPair
from common.io import Scan, save_field, save_image, save_transform
from common.spatial import SpatialTransform, jacobian_determinant, warp, warp_labels, warp_scan

__all__ = [
    "FORMS",
    "as_image",
    "jacobian_map",
    "to_one_scale",
    "write_inverse",
    "write_jacobian",
    "write_map",
    "write_moved",
    "write_moved_label",
    "write_transform",
]

logger = logging.getLogger(__name__)

#: What a transform can be written as: two forms of a displacement field, and ITK's composite.
FORMS = ("itk", "l2r", "composite")

_ROWS = 16  # of the fixed grid whose determinants are computed at a time: nine derivatives of a volume are many


def as_image(scan: Scan, device: torch.device) -> Tensor:
    """(1, 1, \\*S) float32."""
    return torch.from_numpy(scan.array.astype("float32"))[None, None].to(device)


def write_moved(folder: Path, found: RegisteredPair) -> tuple[Tensor, Tensor]:
    """``moved.nii.gz``: the moving scan on the fixed one's grid, interpolated once.

    Returns:
        the moving scan and the moved one, (1, 1, \\*S).
    """
    image = as_image(found.moving, found.device)
    moved = warp_scan(image, found.ddf)
    save_image(folder / "moved.nii.gz", moved[0, 0].cpu().numpy(), found.fixed.affine_3d)
    return image, moved


def write_moved_label(folder: Path, found: RegisteredPair, start: Tensor) -> dict[str, Tensor]:
    """``moved_label.nii.gz``, where the pair names a label map of the moving scan.

    Returns:
        for the picture, ``moving_label`` and ``moved_label`` (1, \\*S), both on the fixed grid.
    """
    volume = found.label("moving")
    if volume is None:
        return {}
    after = warp_labels(volume, found.ddf, padding="zeros")[0]
    before = warp(volume, start, mode="nearest", padding="zeros")[0]  # for pictures alone, in a tenth of the time
    save_image(folder / "moved_label.nii.gz", after[0].cpu().numpy(), found.fixed.affine_3d)
    return {"moving_label": before, "moved_label": after}


def write_transform(
    folder: Path, found: RegisteredPair, transform: SpatialTransform, forms: Sequence[str], about: Mapping[str, Any]
) -> None:
    """``ddf.nii.gz`` and ``transform.h5``, each with its sidecar.

    Args:
        folder: where to.
        found: the pair.
        transform: its transform.
        forms: of :data:`FORMS`; of two forms of a field the second is called ``ddf_<form>.nii.gz``.
        about: what all sidecars say.
    """
    about = {**about, "affine_part": "none" if found.affine_part is None else "what the network started from"}
    scans = {"fixed": found.fixed, "moving": found.moving}
    _write_forms(folder, "", (found.ddf, transform), scans, forms, about)


def write_inverse(
    folder: Path,
    found: RegisteredPair,
    transform: SpatialTransform,
    forms: Sequence[str],
    about: Mapping[str, Any],
    folded: int = 0,
) -> tuple[SpatialTransform, float | None]:
    """``inverse_ddf.nii.gz``, ``inverse_transform.h5`` and ``inverse_moved.nii.gz``, the way back, on the moving grid.

    It is the network's own inverse where it gives one, otherwise a numerical one.

    Args:
        folder: where to.
        found: the pair.
        transform: the way there.
        forms: as in :func:`write_transform`.
        about: what all sidecars say.
        folded: how many voxels of the way there fold, which is worth a warning.

    Returns:
        the way back and, of a numerical inverse, how far at most, in mm, going there and back ends from where it began.
    """
    ddf, residual = found.inverse_ddf(), None
    if ddf is not None:
        back = found.inverse_transform(ddf)
        about = {**about, "inversion": "by the method: the network's own inverse field"}
    else:
        back, residual = _inverted(folder, found, transform, folded)
        ddf = back.ddf(found.moving_grid, found.fixed_grid)
        about = {**about, "inversion": "numerical: fixed point, then Newton's method", "residual_mm": residual}
    moved = warp_scan(as_image(found.fixed, found.device), ddf)
    save_image(folder / "inverse_moved.nii.gz", moved[0, 0].cpu().numpy(), found.moving.affine_3d)
    scans = {"moving": found.moving, "fixed": found.fixed}
    _write_forms(folder, "inverse_", (ddf, back), scans, forms, about)
    return back, residual


def _inverted(
    folder: Path, found: RegisteredPair, transform: SpatialTransform, folded: int
) -> tuple[SpatialTransform, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said here, with the folder and in mm
        back, residual = transform.inverse()
    notes = []
    if folded:
        share = 100 * folded / found.ddf[0, 0].numel()
        notes.append(f"it folds at {folded} voxels ({share:.2g} %), where several points have one partner")
    if residual > min(found.fixed.spacing) / 4:
        notes.append(f"there and back ends up to {residual:.2f} mm away")
    if notes:
        logger.warning(
            "%s: the field has no inverse everywhere: %s; look at jacobian.nii.gz before you use inverse_*",
            *(folder, ", and ".join(notes)),
        )
    return back, residual


def _write_forms(
    folder: Path,
    prefix: str,
    motion: tuple[Tensor, SpatialTransform],
    scans: Mapping[str, Scan],
    forms: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    (source, lies_on), (target, leads_to) = scans.items()
    said: dict[str, Any] = {"roles": (source, target)}
    fields = [form for form in forms if form != "composite"]
    for form in fields:
        path = folder / f"{prefix}ddf{'' if form == fields[0] else '_' + form}.nii.gz"
        shapes = {f"{target}_shape": list(leads_to.array.shape)}
        affines = lies_on.affine_3d, leads_to.affine_3d
        save_field(path, motion[0], *affines, fmt=form, sidecar=True, about={**shapes, **about}, **said)
    if "composite" in forms:
        save_transform(folder / f"{prefix}transform.h5", motion[1], lies_on, leads_to, about=about, **said)


def write_jacobian(folder: Path, found: RegisteredPair) -> Tensor:
    """``jacobian.nii.gz``: see :func:`jacobian_map`, which is returned."""
    determinant = jacobian_map(found)
    save_image(folder / "jacobian.nii.gz", determinant.cpu().numpy(), found.fixed.affine_3d)
    return determinant


def jacobian_map(found: RegisteredPair) -> Tensor:
    """How much volume of the moving scan's world a unit of the fixed scan's world takes; 0 and less is a fold.

    With voxels i of the fixed file at A i and voxels j of the moving one at B j, ``i -> i + ddf(i)`` is the map
    ``T(x) = B (f(A^-1 x))``, f(i) = i + ddf(i), whose determinant is det(B) det(f') / det(A). The affine part counts; a
    grid that is stored mirrored changes both signs.

    Returns:
        (\\*S) float32, on the grid of the fixed file.
    """
    linear = [grid.affine[:-1, :-1] for grid in (found.fixed_grid, found.moving_grid)]
    ratio = float(torch.linalg.det(linear[1]) / torch.linalg.det(linear[0]))
    rows = found.ddf.shape[2]
    result = torch.empty(found.ddf.shape[2:], device=found.device)
    for first in range(0, rows, _ROWS):
        low, high = max(first - 1, 0), min(first + _ROWS + 1, rows)  # central differences look one row further
        part = jacobian_determinant(found.ddf[:, :, low:high])[0]
        last = min(first + _ROWS, rows)
        result[first:last] = part[first - low : last - low]
    return result.mul_(ratio)


def write_map(folder: Path, name: str, found: RegisteredPair, seen: Tensor) -> Tensor:
    """``<name>.nii.gz``: a map (1, 1, \\*S) of the network on the grid of the fixed file; returns it, (1, \\*S)."""
    on_file = found.map_on_file(seen)[0]
    save_image(folder / f"{name}.nii.gz", on_file[0].cpu().numpy(), found.fixed.affine_3d)
    return on_file


def to_one_scale(reference: Tensor, *images: Tensor) -> list[Tensor]:
    """Bring percentiles of the reference to 0 and 1, so that scans of different range can be compared by eye."""
    low, high = (float(value) for value in np.percentile(reference.cpu().numpy(), (0.5, 99.5)))
    return [((image - low) / max(high - low, 1e-12)).clamp(0, 1) for image in images]
