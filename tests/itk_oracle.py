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
"""What ITK makes of scans and transforms that we write, and scans in every orientation to try it on."""

from __future__ import annotations

from pathlib import Path

import itk
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from common.io import Scan, grid_of, load_image, save_image
from common.spatial import Affine, Displacement, SpatialTransform, warp

ORIENTATIONS = ("RAS", "LAS", "LPS", "oblique")
SHAPES = {2: ((23, 19), (20, 25)), 3: ((17, 19, 13), (15, 16, 18))}
SPACINGS = {2: ((1.5, 0.75), (1.0, 1.25)), 3: ((1.5, 1.0, 2.0), (1.25, 1.5, 1.0))}
#: Orientations of the fixed scan and dimensions, and what to call them.
MATRIX = [(orientation, d) for d in (2, 3) for orientation in ORIENTATIONS]
NAMES = [f"{orientation}-{d}D" for orientation, d in MATRIX]


def placement(orientation: str, shape: tuple[int, ...], spacing: tuple[float, ...], centre: float) -> np.ndarray:
    """A voxel-to-RAS affine whose field of view is centred at ``centre`` mm on each axis."""
    d = len(shape)
    signs = {"RAS": (1, 1, 1), "LAS": (-1, 1, 1), "LPS": (-1, -1, 1), "oblique": (-1, 1, 1)}[orientation]
    rotation = np.diag(signs[:d]).astype(float)  # "oblique" is mirrored too
    if orientation == "oblique":
        wobble = np.random.default_rng(5).standard_normal((d, d))
        rotation = np.linalg.qr(np.eye(d) + 0.4 * (wobble - wobble.T))[0]
        rotation *= np.sign(np.diag(rotation)) * signs[:d]
    affine = np.eye(d + 1)
    affine[:d, :d] = rotation * spacing
    affine[:d, d] = centre - affine[:d, :d] @ ((np.array(shape) - 1) / 2)
    return affine


def two_scans(folder: Path, orientation: str, d: int, rng: np.random.Generator) -> list[Scan]:
    """``fixed.nii.gz`` and ``moving.nii.gz`` of smooth noise, of other sizes, spacings and orientations."""
    other = ORIENTATIONS[(ORIENTATIONS.index(orientation) + 1) % 4]
    scans = []
    for name, turn, shape, spacing, centre in zip(
        ("fixed", "moving"), (orientation, other), SHAPES[d], SPACINGS[d], (4.0, 5.0), strict=True
    ):
        array = gaussian_filter(rng.random(shape), 1.0).astype(np.float32)
        save_image(folder / f"{name}.nii.gz", array, placement(turn, shape, spacing, centre))
        scans.append(load_image(folder / f"{name}.nii.gz"))
    return scans


def ours(transform: SpatialTransform, moving: Scan, fixed: Scan) -> tuple[np.ndarray, np.ndarray]:
    """The moved image, and where it was read from inside of the scan, by parts of the chain that reach so far.

    Beyond a field's grid ITK moves nothing, where ours keeps the border's displacement; by rounding, it takes some of
    the outermost voxels to lie beyond.
    """
    ddf = transform.ddf(grid_of(fixed), grid_of(moving))
    moved = warp(torch.from_numpy(moving.array)[None, None], ddf, padding="zeros")[0, 0].numpy()
    read = np.indices(fixed.array.shape) + ddf[0].numpy()
    last = np.array(moving.array.shape).reshape(-1, *[1] * len(moving.array.shape)) - 1
    inside = ((read > 0.01) & (read < last - 0.01)).all(0)
    if isinstance(transform.parts[-1], Displacement):
        nothing = Affine(torch.eye(fixed.spatial_dims + 1))
        first, field = SpatialTransform((nothing, *transform.parts[:-1])), transform.parts[-1].grid
        met = first.ddf(grid_of(fixed), field)[0].numpy() + np.indices(fixed.array.shape)
        last = np.array(field.shape).reshape(-1, *[1] * len(field.shape)) - 1
        inside &= ((met > 0) & (met < last)).all(0)
    return moved, inside & np.pad(np.ones([n - 2 for n in inside.shape], bool), 1)


def by_itk(transform: itk.Transform, moving: Scan, fixed: Scan) -> np.ndarray:
    """The moved image of ITK, which reads the same files."""
    d = fixed.spatial_dims
    kind = itk.Image[itk.F, d]
    reference, source = (read_by_itk(scan) for scan in (fixed, moving))
    resampler = itk.ResampleImageFilter[kind, kind].New(
        source, Transform=transform, UseReferenceImage=True, ReferenceImage=reference
    )
    resampler.SetInterpolator(itk.LinearInterpolateImageFunction[kind, itk.D].New())
    resampler.Update()
    return np.array(itk.array_from_image(resampler.GetOutput()).T)


def read_by_itk(scan: Scan) -> itk.Image:
    """ITK reads (x, y, 1) as a volume; as a plane it keeps the in-plane part of the header."""
    volume = itk.imread(str(scan.path), itk.F)
    if scan.spatial_dims == 3:
        return volume
    plane = itk.image_from_array(itk.array_from_image(volume)[0].copy())
    plane.SetSpacing(list(volume.GetSpacing())[:2])
    plane.SetOrigin(list(volume.GetOrigin())[:2])
    plane.SetDirection(itk.matrix_from_array(np.asarray(volume.GetDirection())[:2, :2].copy()))
    return plane


def itk_transform(path: Path, d: int) -> itk.Transform:
    """What ITK makes of a file of ours."""
    if path.name.endswith(".nii.gz"):
        vectors = itk.imread(str(path), itk.Vector[itk.F, d])
        # Resampling wants a transform of doubles.
        array = np.ascontiguousarray(itk.array_from_image(vectors), dtype=np.float64)
        image = itk.PyBuffer[itk.Image[itk.Vector[itk.D, d], d]].GetImageViewFromArray(array, True)
        image.SetOrigin(vectors.GetOrigin())
        image.SetSpacing(vectors.GetSpacing())
        image.SetDirection(vectors.GetDirection())
        transform = itk.DisplacementFieldTransform[itk.D, d].New()
        transform.SetDisplacementField(image)
        transform.seen = array  # ITK does not own these numbers
        return transform
    (transform,) = itk.transformread(str(path))
    return transform


def lps(points: np.ndarray) -> np.ndarray:
    return points * np.array([-1.0, -1.0, 1.0][: points.shape[1]])


def inner_points(scan: Scan, count: int = 12) -> np.ndarray:
    """RAS mm, in the inner half of a scan."""
    shape = np.array(scan.array.shape)
    voxels = np.random.default_rng(7).uniform(0.3, 0.7, (count, len(shape))) * (shape - 1)
    return voxels @ scan.affine[:-1, :-1].T + scan.affine[:-1, -1]
