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
"""The embedded cine cohort: hearts at the end of diastole and of systole, made from a seed; no scan is in it.

A subject is a slice through an invented chest: body, lungs, a ring of myocardium around the left ventricle's blood, and
the right ventricle's crescent beside it. Systole is the same tissue seen through a smooth diffeomorphism that draws
both ventricles together, turns the heart and lets the chest breathe a little. Everything, the texture of the tissue
too, is evaluated at the displaced coordinates rather than interpolated, so labels are exact and the motion is known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.data.cohort import Cohort, cohort_from_json
from common.data.download import cache_folder
from common.data.embedded import save_bytes, written_whole
from common.data.pairing import generator_for
from common.spatial import few_threads, integrate

__all__ = ["LABELS", "CinePair", "cine_cohort", "make_cine_pair"]

logger = logging.getLogger(__name__)

LABELS = {0: "background", 1: "left ventricle", 2: "myocardium", 3: "right ventricle"}

# Increase whenever the same arguments begin to give other images: the version is part of the folder's name.
VERSION = 1
_SPLITS = {"training": range(40), "validation": range(40, 48), "test": range(48, 64)}
_SPACING = 1.8
_EDGE = 0.018


class CinePair(NamedTuple):
    """One subject at both ends of the contraction.

    Attributes:
        fixed, moving: images (*S) float32 in [0,1] at the end of diastole and of systole.
        fixed_label, moving_label: (*S) uint8, see ``LABELS``.
        true_ddf: (2,*S) voxels, from diastole to systole: ``moving(x + true_ddf(x))`` is the tissue of ``fixed(x)``.
    """

    fixed: Tensor
    moving: Tensor
    fixed_label: Tensor
    moving_label: Tensor
    true_ddf: Tensor


class _Heart(NamedTuple):
    """The shape of one subject, in units of half the image."""

    centre: Tensor
    blood: float
    wall: float
    oval: float
    angle: float


def cine_cohort(
    dataset_dir: str | Path | None = None,
    *,
    spatial_dims: int = 2,
    spatial_size: int | Sequence[int] = 96,
    anatomy_seed: int = 0,
    magnitude: float = 1.0,
) -> Cohort:
    """Load the embedded cine cohort, writing its NIfTI files first where they are missing.

    64 subjects with one pair each, systole (moving) to diastole (fixed): 40 to train, 8 to validate, 16 to test.

    Args:
        dataset_dir: where the cohort's own folder lies or is made. Default: the user's cache folder.
        spatial_dims: 2; there is no other.
        spatial_size: grid, at least 32 along each axis.
        anatomy_seed: of all subjects.
        magnitude: of the motion; 1 is a healthy heart's, with a mean Dice before registration of about 0.65.

    Returns:
        the cohort, named ``cine``, with ``training_pairs``.

    Raises:
        ValueError: for three dimensions or an impossible size.
    """
    if spatial_dims != 2:
        raise ValueError(f"cohort 'cine' is 2-D, spatial_dims is {spatial_dims}")
    size = _grid(spatial_size)
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else cache_folder()
    folder = root / f"cine_v{VERSION}_{size[0]}x{size[1]}_seed{anatomy_seed}" / f"magnitude{magnitude:g}"
    if not (folder / "dataset.json").is_file():
        logger.info("writing the cine cohort to %s", folder)
        with written_whole(folder, _description(size)) as half_made, few_threads():
            for subject in (n for members in _SPLITS.values() for n in members):
                _write_subject(
                    half_made, make_cine_pair(size, seed=anatomy_seed, subject=subject, magnitude=magnitude), subject
                )
    return cohort_from_json(folder / "dataset.json", folder)


def make_cine_pair(
    size: Sequence[int], *, seed: int = 0, subject: int = 0, magnitude: float = 1.0, level: float = 0.0
) -> CinePair:
    """One subject of the cohort, or one slice of a stack.

    Args:
        size: the grid ``S``, 2-D.
        seed: of the cohort.
        subject: number of the subject.
        magnitude: of its motion; 0 gives the same heart twice.
        level: from -1, the apex, where the ventricles narrow, to 1, the base. Slices of one subject share all but that.

    Returns:
        images, labels and the motion.
    """
    draw = generator_for(seed, subject, 3)
    heart = _heart(draw, level)
    grid = _coordinates(size)
    velocity = magnitude * _velocity(grid, heart, draw)
    half = torch.tensor([(n - 1) / 2 for n in size]).view(-1, 1, 1)
    outward, inward = (integrate((sign * velocity * half)[None])[0] for sign in (1, -1))
    tissue = _Tissue(heart, draw)
    bias = 0.12 * draw.standard_normal(2)
    scans = []
    for place in (grid, grid + inward / half):
        intensity, label = tissue(place)
        scans.append((_scan(intensity, grid, bias, draw), label))
    (fixed, fixed_label), (moving, moving_label) = scans
    return CinePair(fixed, moving, fixed_label, moving_label, outward)


def _grid(spatial_size: int | Sequence[int]) -> tuple[int, ...]:
    size = (spatial_size,) * 2 if isinstance(spatial_size, int) else tuple(int(n) for n in spatial_size)
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f"spatial_size needs 2 numbers of at least 32, found {size}")
    return size


def _coordinates(size: Sequence[int]) -> Tensor:
    """(2,*S) from -1 to 1 along each axis, first to last voxel."""
    return torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, n) for n in size], indexing="ij"))


def _heart(draw: np.random.Generator, level: float) -> _Heart:
    """A heart near the middle, the right ventricle on the lower side of axis 0, more or less turned."""
    narrow = 1 - 0.25 * max(-level, 0.0) - 0.15 * max(-level, 0.0) ** 2
    return _Heart(
        centre=torch.as_tensor(draw.uniform(-0.06, 0.06, 2) + (0.06, 0.0), dtype=torch.float32),
        blood=float(draw.uniform(0.23, 0.28)) * narrow,
        wall=float(draw.uniform(0.09, 0.12)),
        oval=float(draw.uniform(-0.08, 0.08)),
        angle=float(draw.uniform(-0.5, 0.5)),
    )


def _turned(place: Tensor, centre: Tensor, angle: float) -> Tensor:
    """Coordinates (2,*S) about a centre, along axes turned by an angle."""
    first, second = place - centre.view(2, 1, 1)
    cosine, sine = float(np.cos(angle)), float(np.sin(angle))
    return torch.stack([cosine * first + sine * second, cosine * second - sine * first])


def _velocity(grid: Tensor, heart: _Heart, draw: np.random.Generator) -> Tensor:
    """The motion from diastole to systole as a stationary velocity (2,*S), in units of half the image."""
    outer = heart.blood + heart.wall
    offset = grid - heart.centre.view(2, 1, 1)
    near = torch.exp(-2.0 * offset.square().sum(0) / outer**2)
    squeeze = float(draw.uniform(0.7, 1.0))
    twist = float(draw.uniform(0.1, 0.3))
    across = torch.stack([-offset[1], offset[0]])
    velocity = (twist * across - squeeze * offset) * near
    beside = _right_centre(heart)
    from_right = grid - beside.view(2, 1, 1)
    close = torch.exp(-from_right.square().sum(0) / (0.75 * outer) ** 2)
    velocity = velocity - float(draw.uniform(0.35, 0.55)) * from_right * close
    coarse = torch.as_tensor(draw.standard_normal((1, 2, 4, 4)), dtype=torch.float32)
    breath = functional.interpolate(coarse, size=grid.shape[1:], mode="bicubic", align_corners=True)[0]
    edge = grid.abs().amax(0)
    return (velocity + 0.02 * breath) * (1 - edge**6)


def _right_centre(heart: _Heart) -> Tensor:
    """Where the right ventricle's crescent is thickest."""
    reach = heart.blood + heart.wall + 0.1
    direction = torch.tensor([-np.cos(heart.angle), -np.sin(heart.angle)], dtype=torch.float32)
    return heart.centre + reach * direction


class _Tissue:
    """What lies at which place of a subject at the end of diastole.

    Args:
        heart: its shape.
        draw: of contrasts and textures.
    """

    def __init__(self, heart: _Heart, draw: np.random.Generator) -> None:
        self.heart = heart
        blood = 0.78 + 0.05 * draw.standard_normal()
        self.levels = {"air": 0.03, "body": 0.38, "lung": 0.12, "left": blood, "wall": 0.28, "right": 0.96 * blood}
        self.levels = {name: value + 0.02 * draw.standard_normal() for name, value in self.levels.items()}
        self.waves = [(w * draw.standard_normal(2), draw.uniform(0, 2 * np.pi)) for w in (8, 8, 8, 14, 14, 14, 20, 20)]
        self.muscles = draw.uniform(-0.4, 0.4) + np.array([0.9, 2.6])

    def __call__(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Clean intensity (*S) and label (*S) uint8 at places (2,*S)."""
        heart = self.heart
        own = _turned(place, heart.centre, heart.angle)
        stretched = own * torch.tensor([1 + heart.oval, 1 - heart.oval]).view(2, 1, 1)
        radius = stretched.square().sum(0).sqrt()
        outer = heart.blood + heart.wall
        from_right = own + torch.tensor([0.62 * outer, 0.0]).view(2, 1, 1)
        crescent = outer * 1.05 - (from_right * torch.tensor([1.0, 0.92]).view(2, 1, 1)).square().sum(0).sqrt()
        body = 0.9 - (place * torch.tensor([1.0, 1.12]).view(2, 1, 1)).square().sum(0).sqrt()
        sides = torch.tensor([0.1, 0.62]).view(2, 1, 1)
        lung = 0.24 - torch.minimum((place - sides).square().sum(0).sqrt(), (place + sides).square().sum(0).sqrt())
        inside = [
            ("body", body),
            ("lung", lung),
            ("right", crescent),
            ("wall", outer - radius),
            ("left", heart.blood - radius),
        ]
        intensity = torch.full(radius.shape, self.levels["air"])
        for name, level in inside:
            share = torch.sigmoid(level / _EDGE)
            intensity = intensity * (1 - share) + self.levels[name] * share
        intensity = self._papillary(intensity, own)
        label = torch.zeros(radius.shape, dtype=torch.uint8)
        for value, level in ((3, crescent), (2, outer - radius), (1, heart.blood - radius)):
            label[level > 0] = value
        return intensity + 0.05 * self._texture(place) * torch.sigmoid(body / _EDGE), label

    def _papillary(self, intensity: Tensor, own: Tensor) -> Tensor:
        """Two dark muscles in the blood, which the labels count as blood."""
        for angle in self.muscles:
            centre = 0.62 * self.heart.blood * torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float32)
            distance = (own - centre.view(2, 1, 1)).square().sum(0).sqrt()
            share = 0.8 * torch.sigmoid((0.2 * self.heart.blood - distance) / _EDGE)
            intensity = intensity * (1 - share) + self.levels["wall"] * share
        return intensity

    def _texture(self, place: Tensor) -> Tensor:
        """A smooth pattern that belongs to the tissue and moves with it."""
        pattern = torch.zeros(place.shape[1:])
        for direction, phase in self.waves:
            pattern = pattern + torch.sin(torch.tensordot(torch.as_tensor(direction).float(), place, dims=1) + phase)
        return pattern / 2


def _scan(intensity: Tensor, grid: Tensor, bias: np.ndarray, draw: np.random.Generator) -> Tensor:
    """What a scanner adds: the subject's bias field, nearly the same in both phases, a contrast curve, noise."""
    slope = torch.as_tensor(bias + 0.03 * draw.standard_normal(2), dtype=torch.float32)
    biased = intensity * (1 + torch.tensordot(slope, grid, dims=1))
    noise = torch.as_tensor(draw.standard_normal(tuple(intensity.shape), dtype=np.float32))
    return (biased.clamp(0, 1) ** float(draw.uniform(0.95, 1.05)) + 0.025 * noise).clamp(0, 1)


def _write_subject(folder: Path, pair: CinePair, subject: int) -> None:
    affine = np.diag([_SPACING, _SPACING, 1.0, 1.0])
    names = _files(subject)
    for role, image, label in (("moving", pair.moving, pair.moving_label), ("fixed", pair.fixed, pair.fixed_label)):
        save_bytes(folder / names[role], image.numpy(), affine)
        nib.save(nib.Nifti1Image(label.numpy(), affine), folder / names[f"{role}_label"])


def _files(subject: int) -> dict[str, str]:
    entry = {"subject": f"cine_{subject:04d}"}
    for role, phase in (("moving", "ES"), ("fixed", "ED")):
        name = f"cine_{subject:04d}_{phase}"
        entry |= {f"{role}_id": name, role: f"imagesTr/{name}.nii.gz", f"{role}_label": f"labelsTr/{name}.nii.gz"}
    return entry


def _description(size: tuple[int, ...]) -> dict[str, Any]:
    pairs = {name: [_files(subject) for subject in members] for name, members in _SPLITS.items()}
    return {
        "name": "cine",
        "description": "Invented hearts at the end of diastole (fixed) and of systole (moving)",
        "licence": "CC0",
        "source": "made by common.data.cine",
        "tensorImageSize": {"0": "2D"},
        "shape": list(size),
        "spacing": [_SPACING] * 2,
        "orientation": None,
        "labels": {str(value): name for value, name in LABELS.items()},
        "training": pairs.pop("training"),
        **pairs,
    }
