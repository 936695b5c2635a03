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
"""The embedded sliding cohort: two blocks of textured tissue that move past each other; no scan is in it.

A subject is cut in two by a straight interface somewhere near its middle. One block moves along the interface, the
other one the opposite way; the motion is smooth within each block, jumps at the interface, and fades towards the border
of the image and away from the interface. As it is parallel to the interface everywhere, either block is mapped onto
itself, one to one. No field that is smooth everywhere can be right, while one that tears along the interface costs
little elsewhere. Texture and structures are evaluated at the displaced coordinates rather than interpolated, so labels
are exact and the field is known.
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

from common.data.cohort import Cohort, cohort_from_json
from common.data.download import cache_folder
from common.data.embedded import grid_of, save_bytes, written_whole
from common.data.pairing import generator_for
from common.io import save_field
from common.spatial import few_threads

__all__ = ["LABELS", "SlidingPair", "make_sliding_pair", "sliding_cohort"]

logger = logging.getLogger(__name__)

LABELS = {
    0: "tissue",
    1: "first block, at the interface",
    2: "first block, away from it",
    3: "second block, at the interface",
    4: "second block, away from it",
}

# Increase whenever the same arguments begin to give other images: the version is part of the folder's name.
VERSION = 1
_SPLITS = {"training": range(40), "validation": range(40, 48), "test": range(48, 64)}
_EDGE = 0.02
_NOISE = 0.015
_POINTS = 24


class SlidingPair(NamedTuple):
    """One subject before and after its blocks have slid.

    Attributes:
        fixed, moving: images (*S) float32 in [0,1].
        fixed_label, moving_label: (*S) uint8, see ``LABELS``.
        true_ddf: (d,*S) float32 voxels: ``moving(x + true_ddf(x))`` is the tissue of ``fixed(x)``.
        distance: (*S) float32 signed distance from the interface in voxels, positive in the first block.
        fixed_points: (N,d) float64 voxels of the fixed grid, half of them in either block, 1.5 to 4 voxels from the
            interface.
        moving_points: (N,d) float64, where the same tissue lies in the moving image.
    """

    fixed: Tensor
    moving: Tensor
    fixed_label: Tensor
    moving_label: Tensor
    true_ddf: Tensor
    distance: Tensor
    fixed_points: np.ndarray
    moving_points: np.ndarray


def sliding_cohort(
    dataset_dir: str | Path | None = None,
    *,
    spatial_dims: int | None = None,
    spatial_size: int | Sequence[int] | None = None,
    anatomy_seed: int = 0,
    magnitude: float = 1.0,
) -> Cohort:
    """Load the embedded sliding cohort, writing its files first where they are missing.

    64 subjects with one pair each: 40 to train, 8 to validate, 16 to test. Validation and test pairs know their
    ``true_ddf`` and have landmarks on both sides of the interface; nothing trains on the truth.

    Args:
        dataset_dir: where the cohort's own folder lies or is made. Default: the user's cache folder.
        spatial_dims: 2 or 3. Default: the numbers of ``spatial_size``, else 2.
        spatial_size: grid, at least 32 along each axis. Default: 64 (2-D), 48 (3-D).
        anatomy_seed: of all subjects.
        magnitude: of the motion; 1 moves each block by 4 to 6 voxels in 64.

    Returns:
        the cohort, named ``sliding``, with ``training_pairs``.

    Raises:
        ValueError: for an impossible dimension, size or magnitude.
    """
    if spatial_dims is None:
        spatial_dims = len(spatial_size) if isinstance(spatial_size, Sequence) else 2
    size = grid_of(spatial_dims, spatial_size, least=32)
    if not 0 <= magnitude <= 1.5:
        raise ValueError(f"magnitude must be in [0, 1.5], beyond which tissue would fold, found {magnitude}")
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else cache_folder()
    shown = "x".join(str(n) for n in size)
    folder = root / f"sliding_v{VERSION}_{shown}_seed{anatomy_seed}" / f"magnitude{magnitude:g}"
    if not (folder / "dataset.json").is_file():
        logger.info("writing the sliding cohort to %s", folder)
        with written_whole(folder, _description(size)) as half_made, few_threads():
            for name in ("fieldsTr", "landmarksTr"):
                (half_made / name).mkdir()
            for split, members in _SPLITS.items():
                for subject in members:
                    pair = make_sliding_pair(size, seed=anatomy_seed, subject=subject, magnitude=magnitude)
                    _write_subject(half_made, pair, subject, truth=split != "training")
    return cohort_from_json(folder / "dataset.json", folder)


def make_sliding_pair(
    size: Sequence[int], *, seed: int = 0, subject: int = 0, magnitude: float = 1.0, noise: float = _NOISE
) -> SlidingPair:
    """One subject of the cohort.

    Args:
        size: the grid ``S``, 2-D or 3-D.
        seed: of the cohort.
        subject: number of the subject.
        magnitude: of its motion; 0 gives the same tissue twice.
        noise: standard deviation of what is added to either image.

    Returns:
        images, labels and the motion.
    """
    draw = generator_for(seed, subject, 4)
    motion = _Motion(size, magnitude, draw)
    tissue = _Tissue(motion, draw)
    places = motion.places()
    ddf = motion(places)
    scans = []
    for at in (places + ddf, places):
        intensity, label = tissue(at)
        added = noise * torch.as_tensor(draw.standard_normal(tuple(size)))
        scans.append(((intensity + added).clamp(0, 1).float(), label))
    (fixed, fixed_label), (moving, moving_label) = scans
    points = motion.points_near(draw, _POINTS)
    moved = points + motion(torch.as_tensor(points.T)).numpy().T
    distance = motion.own(places)[0] * motion.unit
    return SlidingPair(fixed, moving, fixed_label, moving_label, ddf.float(), distance.float(), points, moved)


class _Motion:
    """Where the interface of a subject lies and how its blocks move.

    Places are (d,...) in voxels; a block's own coordinates, in units of half the shortest axis, are the signed distance
    from the interface and then the directions within it, the first of which is that of the motion.

    Args:
        size: the grid.
        magnitude: of the motion.
        draw: of position, orientation and amplitude.
    """

    def __init__(self, size: Sequence[int], magnitude: float, draw: np.random.Generator) -> None:
        self.size = tuple(size)
        dims = len(self.size)
        self.middle = torch.tensor([(n - 1) / 2 for n in self.size], dtype=torch.float64)
        self.unit = float(self.middle.min())
        # Rows of a rotation: the normal, the direction of the motion, and what is across both. Signs are drawn too, for
        # the decomposition gives all of one handedness, and then the first block would always go the same way.
        rotation, _ = np.linalg.qr(draw.standard_normal((dims, dims)))
        self.axes = torch.as_tensor(rotation.T * draw.choice([-1.0, 1.0], (dims, 1)))
        self.offset = float(draw.uniform(-0.2, 0.2))
        self.amplitude = magnitude * float(draw.uniform(4.0, 6.0)) * min(self.size) / 64
        self.reach = float(draw.uniform(0.8, 1.1))

    def places(self) -> Tensor:
        """Every voxel of the grid, (d,*S) float64."""
        steps = [torch.arange(n, dtype=torch.float64) for n in self.size]
        return torch.stack(torch.meshgrid(*steps, indexing="ij"))

    def own(self, places: Tensor) -> Tensor:
        """A block's own coordinates (d,...) of places (d,...)."""
        centred = (places - self._along(self.middle, places)) / self.unit
        own = torch.tensordot(self.axes, centred, dims=1)
        own[0] -= self.offset
        return own

    def __call__(self, places: Tensor) -> Tensor:
        """The displacement (d,...) in voxels at places (d,...)."""
        distance = self.own(places)[0]
        to_border = (places - self._along(self.middle, places)) / self._along(self.middle, places)
        inside = (1 - to_border.clamp(-1, 1) ** 4).prod(0)
        side = torch.where(distance > 0, 1.0, -1.0).to(distance)
        size = self.amplitude * side * inside * torch.exp(-((distance / self.reach) ** 2))
        return size * self._along(self.axes[1], places)

    def points_near(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Random points (count,d) in voxels, half on either side of the interface and 1.5 to 4 voxels from it."""
        own = draw.uniform(-0.7, 0.7, (count, len(self.size)))
        own[:, 0] = draw.uniform(1.5, 4.0, count) / self.unit * np.where(np.arange(count) % 2, 1, -1) + self.offset
        points = own @ self.axes.numpy() * self.unit + self.middle.numpy()
        margin = 0.1 * np.asarray(self.size)
        # What would lie at the border, where nothing moves, is pulled inwards along the interface.
        for _ in range(20):
            outside = ((points < margin) | (points > np.asarray(self.size) - 1 - margin)).any(1)
            own[outside, 1:] *= 0.8
            points = own @ self.axes.numpy() * self.unit + self.middle.numpy()
        return np.asarray(points, dtype=np.float64)

    @staticmethod
    def _along(vector: Tensor, places: Tensor) -> Tensor:
        return vector.to(places).view(-1, *[1] * (places.ndim - 1))


class _Tissue:
    """What lies at which place of a subject before it moves.

    Args:
        motion: of the subject, which knows its interface.
        draw: of structures, contrasts and textures.
    """

    def __init__(self, motion: _Motion, draw: np.random.Generator) -> None:
        self.motion = motion
        dims = len(motion.size)
        self.blocks = 0.42 + 0.09 * np.array([1.0, -1.0]) * draw.choice([-1.0, 1.0]) + 0.02 * draw.standard_normal(2)
        self.structures = []
        for value in LABELS:
            if value == 0:
                continue
            side, touches = (1.0 if value < 3 else -1.0), value % 2 == 1
            centre = draw.uniform(-0.35, 0.35, dims)
            # A structure at the interface is cut by it; the other one keeps clear of it.
            centre[0] = side * (0.0 if touches else draw.uniform(0.42, 0.5))
            radii = draw.uniform(0.2, 0.27, dims) if touches else draw.uniform(0.13, 0.19, dims)
            contrast = float(draw.choice([-0.28, 0.28]) + 0.03 * draw.standard_normal())
            self.structures.append((value, side, torch.as_tensor(centre), torch.as_tensor(radii), contrast))
        # Wavelengths of 9 to 22 voxels in 64: short enough to match places by, long enough to be found from afar.
        lengths = np.geomspace(9, 22, 12) / 32
        directions = draw.standard_normal((2, len(lengths), dims))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        self.waves = torch.as_tensor(directions * (2 * np.pi / lengths)[:, None])
        self.phases = torch.as_tensor(draw.uniform(0, 2 * np.pi, (2, len(lengths))))

    def __call__(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Clean intensity (*S) and label (*S) uint8 at places (d,*S) in voxels."""
        own = self.motion.own(places)
        label = torch.zeros(places.shape[1:], dtype=torch.uint8)
        intensity = torch.zeros(places.shape[1:], dtype=places.dtype)
        for block, side in enumerate((1.0, -1.0)):
            mine = own[0] * side > 0 if side > 0 else own[0] <= 0
            tone = self.blocks[block] + 0.035 * self._texture(own, block)
            for value, belongs, centre, radii, contrast in self.structures:
                if belongs != side:
                    continue
                level = 1 - ((own - _Motion._along(centre, own)) / _Motion._along(radii, own)).square().sum(0).sqrt()
                tone = tone + contrast * torch.sigmoid(level * float(radii.min()) / _EDGE)
                label[mine & (level > 0)] = value
            intensity = torch.where(mine, tone, intensity)
        return intensity, label

    def _texture(self, own: Tensor, block: int) -> Tensor:
        """A smooth pattern that belongs to the block and moves with it."""
        pattern = torch.zeros(own.shape[1:], dtype=own.dtype)
        for direction, phase in zip(self.waves[block], self.phases[block], strict=True):
            pattern = pattern + torch.sin(torch.tensordot(direction, own, dims=1) + phase)
        return pattern


def _write_subject(folder: Path, pair: SlidingPair, subject: int, truth: bool) -> None:
    affine = np.eye(4)
    names = _files(subject, truth)
    for role, image, label in (("moving", pair.moving, pair.moving_label), ("fixed", pair.fixed, pair.fixed_label)):
        save_bytes(folder / names[role], image.numpy(), affine)
        nib.save(nib.Nifti1Image(label.numpy(), affine), folder / names[f"{role}_label"])
    if truth:
        save_field(folder / names["true_ddf"], pair.true_ddf, affine, fmt="l2r")
        for role, points in (("moving", pair.moving_points), ("fixed", pair.fixed_points)):
            np.savetxt(folder / names[f"{role}_landmarks"], points, fmt="%.6f", delimiter=",")


def _files(subject: int, truth: bool) -> dict[str, str]:
    name = f"sliding_{subject:04d}"
    entry = {"subject": name}
    for role, number in (("fixed", 0), ("moving", 1)):
        scan = f"{name}_{number:04d}"
        entry |= {f"{role}_id": scan, role: f"imagesTr/{scan}.nii.gz", f"{role}_label": f"labelsTr/{scan}.nii.gz"}
        if truth:
            entry[f"{role}_landmarks"] = f"landmarksTr/{scan}.csv"
    if truth:
        entry["true_ddf"] = f"fieldsTr/{name}.nii.gz"
    return entry


def _description(size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": "sliding",
        "description": "Invented tissue in two blocks before (moving) and after (fixed) they slid past each other",
        "licence": "CC0",
        "source": "made by common.data.sliding",
        "tensorImageSize": {"0": f"{len(size)}D"},
        "shape": list(size),
        "spacing": [1.0] * len(size),
        "orientation": "RAS" if len(size) == 3 else None,
        "labels": {str(value): name for value, name in LABELS.items()},
        **{
            name: [_files(subject, truth=name != "training") for subject in members]
            for name, members in _SPLITS.items()
        },
    }
