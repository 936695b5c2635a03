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
"""The embedded cohort: one invented organ in many subjects, so that everything runs at once and offline.

The organ is analytic: a body, a shell, and structures nested in it, each the level set of a smooth function. A
subject is the organ seen through its own random smooth diffeomorphism, evaluated at the displaced coordinates rather
than interpolated, with its own contrast, bias field and noise. Registration can therefore recover all of the
difference in shape, and the labels are exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.data.cohort import Cohort, cohort_from_json
from common.data.download import cache_folder
from common.data.embedded import grid_of, save_bytes, written_whole
from common.data.pairing import generator_for
from common.spatial import few_threads, integrate

__all__ = ["LABELS", "make_subject", "synthetic_cohort"]

logger = logging.getLogger(__name__)

LABELS = {0: "background", 1: "body", 2: "core", 3: "left chamber", 4: "right chamber", 5: "stem"}

# Increase whenever the same arguments begin to give other images: the version is part of the folder's name.
VERSION = 1
_TRAINING, _VALIDATION, _TEST = 16, 3, 5
_COUNT = _TRAINING + _VALIDATION + _TEST


def synthetic_cohort(
    dataset_dir: str | Path | None = None,
    *,
    spatial_dims: int = 3,
    spatial_size: int | Sequence[int] | None = None,
    anatomy_seed: int = 0,
    magnitude: float = 1.0,
) -> Cohort:
    """Load the embedded cohort, writing its NIfTI files first where they are missing.

    24 subjects: 16 for training, 3 for validation (6 ordered pairs), 5 for test (20 ordered pairs).

    Args:
        dataset_dir: where the cohort's own folder lies or is made. Default: the user's cache folder.
        spatial_dims: 2 or 3.
        spatial_size: grid, at least 16 along each axis. Default: 48 (3-D), 64 (2-D).
        anatomy_seed: of the organ and of all subjects.
        magnitude: of the deformations; 1 gives a mean Dice between subjects of about 0.6.

    Returns:
        the cohort, named ``synthetic``.

    Raises:
        ValueError: for an impossible dimension or size.
    """
    size = grid_of(spatial_dims, spatial_size, least=16)
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else cache_folder()
    shown = "x".join(str(n) for n in size)
    folder = root / f"synthetic_v{VERSION}_{shown}_seed{anatomy_seed}" / f"magnitude{magnitude:g}"
    if not (folder / "dataset.json").is_file():
        _write(folder, size, anatomy_seed, magnitude)
    return cohort_from_json(folder / "dataset.json", folder)


def make_subject(
    size: Sequence[int], *, seed: int = 0, subject: int = 0, magnitude: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One subject of the cohort.

    Args:
        size: the grid ``S``, 2-D or 3-D.
        seed: of the cohort.
        subject: number of the subject.
        magnitude: of its deformation; 0 gives the organ itself.

    Returns:
        image (*S) float32 in [0,1] and label (*S) uint8.
    """
    draw = generator_for(seed, subject, 2)
    coordinates = _coordinates(size)
    if magnitude > 0:
        ddf = _deformation(size, draw, magnitude)
        half = torch.tensor([(n - 1) / 2 for n in size]).view(-1, *[1] * len(size))
        coordinates = coordinates + ddf / half
    intensity, label = _organ(coordinates, np.random.default_rng(seed), draw)
    return _scan(intensity, _coordinates(size), draw), label


def _coordinates(size: Sequence[int]) -> Tensor:
    """(d,*S) from -1 to 1 along each axis, first to last voxel."""
    return torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij"))


def _deformation(size: Sequence[int], draw: np.random.Generator, magnitude: float) -> Tensor:
    """A diffeomorphism (d,*S) in voxels: an integrated velocity with coarse and fine bumps, small at the border."""
    dimensions = len(size)
    velocity = torch.zeros(1, dimensions, *size)
    for nodes, amplitude in ((4, 0.055), (7, 0.022)):
        coarse = torch.as_tensor(draw.standard_normal((1, dimensions, *[nodes] * dimensions)), dtype=torch.float32)
        mode = "trilinear" if dimensions == 3 else "bilinear"
        bumps = functional.interpolate(coarse, size=tuple(size), mode=mode, align_corners=True)
        velocity += amplitude * magnitude * _smooth(bumps, [n / nodes / 3 for n in size])
    velocity *= torch.tensor([float(n) for n in size]).view(1, -1, *[1] * dimensions)
    distance = _coordinates(size).abs().amax(0)
    return integrate(velocity * (1 - distance**6))[0]


def _smooth(field: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Gaussian smoothing that takes away the kinks of linear interpolation."""
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(field.numpy(), (0, 0, *sigmas), mode="nearest"))


def _organ(x: Tensor, shape: np.random.Generator, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The organ at coordinates (d,*S): clean intensity (*S) and label (*S) uint8. ``shape`` is the cohort's."""
    dimensions = x.shape[0]

    def blob(centre: Sequence[float], radii: Sequence[float], wobble: float = 0.08) -> Tensor:
        """Positive inside an ellipsoid with a wavy surface, about 1 at its centre."""
        axes = [1, *([1] * (dimensions - 1))]
        c = torch.tensor(centre[:dimensions]).view(-1, *axes)
        r = torch.tensor(radii[:dimensions]).view(-1, *axes)
        waves = torch.zeros(x.shape[1:])
        for _ in range(4):
            direction = torch.as_tensor(shape.standard_normal(dimensions), dtype=torch.float32)
            phase = float(shape.uniform(0, 2 * np.pi))
            waves = waves + torch.sin(3 * torch.tensordot(direction, x, dims=1) + phase)
        return 1 - ((x - c) / r).square().sum(0).sqrt() + wobble * waves / 2

    structures = [
        blob((0.0, 0.0, 0.0), (0.72, 0.62, 0.66)),
        blob((0.05, 0.05, 0.0), (0.46, 0.38, 0.42)),
        blob((0.10, -0.17, 0.05), (0.26, 0.13, 0.19), 0.12),
        blob((0.10, 0.19, 0.02), (0.24, 0.13, 0.21), 0.12),
        blob((-0.42, 0.02, 0.04), (0.25, 0.13, 0.15), 0.12),
    ]
    label = torch.zeros(x.shape[1:], dtype=torch.uint8)
    intensity = torch.full(x.shape[1:], 0.05)
    for value, (level, contrast) in enumerate(zip(structures, (0.45, 0.68, 0.25, 0.30, 0.88), strict=True), start=1):
        own = contrast + 0.03 * float(draw.standard_normal())
        inside = torch.sigmoid(level / 0.05)
        intensity = intensity * (1 - inside) + own * inside
        label[level > 0] = value
    return intensity + 0.05 * _texture(x, shape) * torch.sigmoid(structures[0] / 0.05), label


def _texture(x: Tensor, shape: np.random.Generator) -> Tensor:
    """A smooth pattern that belongs to the organ and moves with it, so that its inside can be matched."""
    pattern = torch.zeros(x.shape[1:])
    for _ in range(8):
        direction = torch.as_tensor(shape.standard_normal(x.shape[0]), dtype=torch.float32)
        pattern = pattern + torch.sin(7 * torch.tensordot(direction, x, dims=1) + float(shape.uniform(0, 2 * np.pi)))
    return pattern / 2


def _scan(intensity: Tensor, x: Tensor, draw: np.random.Generator) -> Tensor:
    """What a scanner adds: a bias field, a contrast curve, noise."""
    slope = torch.as_tensor(0.05 * draw.standard_normal(x.shape[0]), dtype=torch.float32)
    biased = intensity * (1 + torch.tensordot(slope, x, dims=1))
    noise = torch.as_tensor(draw.standard_normal(tuple(intensity.shape), dtype=np.float32))
    return (biased.clamp(0, 1) ** float(draw.uniform(0.9, 1.1)) + 0.02 * noise).clamp(0, 1)


def _write(folder: Path, size: tuple[int, ...], seed: int, magnitude: float) -> None:
    logger.info("writing the synthetic cohort to %s", folder)
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    with written_whole(folder, _description(size)) as half_made, few_threads():
        for subject in range(_COUNT):
            image, label = make_subject(size, seed=seed, subject=subject, magnitude=magnitude)
            save_bytes(half_made / _image(subject), image.numpy(), affine)
            nib.save(nib.Nifti1Image(label.numpy(), affine), half_made / _label(subject))


def _image(subject: int) -> str:
    return f"imagesTr/synthetic_{subject:04d}_0000.nii.gz"


def _label(subject: int) -> str:
    return f"labelsTr/synthetic_{subject:04d}_0000.nii.gz"


def _description(size: tuple[int, ...]) -> dict[str, object]:
    def ordered_pairs(members: range) -> list[dict[str, str]]:
        return [
            {"moving": _image(m), "fixed": _image(f), "moving_label": _label(m), "fixed_label": _label(f)}
            for f in members
            for m in members
            if m != f
        ]

    validation = range(_TRAINING, _TRAINING + _VALIDATION)
    return {
        "name": "synthetic",
        "description": "One invented organ, seen through random smooth diffeomorphisms",
        "licence": "CC0",
        "source": "made by common.data.synthetic",
        "tensorImageSize": {"0": f"{len(size)}D"},
        "shape": list(size),
        "spacing": [1.0] * len(size),
        "orientation": "RAS"[: len(size)] if len(size) == 3 else None,
        "labels": {str(value): name for value, name in LABELS.items()},
        "training": [{"image": _image(subject), "label": _label(subject)} for subject in range(_TRAINING)],
        "validation": ordered_pairs(validation),
        "test": ordered_pairs(range(_TRAINING + _VALIDATION, _COUNT)),
    }
