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
"""The embedded contrast cohort: an atlas, and subjects that a scanner shows with other intensities; no scan is in it.

The anatomy is analytic: a folded rim around structures nested in it, each the level set of a smooth function. A subject
is the anatomy of the atlas seen through its own smooth one-to-one map, evaluated at the mapped coordinates rather than
interpolated, so labels are exact and the field that leads back is known. In the atlas the tissues are dark and far
apart; a subject's scan brightens them by a power law, moves the levels a little, and multiplies all by a smooth bias
field. What is bright in the atlas is then about as bright as what is darker in a subject: the intensities of either
side of an edge agree with the wrong tissue, while the edges lie where they should and point the same way. A squared
difference of intensities is misled by that, one of suitable features is not.
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
from common.data.contrast_tissue import EDGE, Anatomy, Scanner, Shape, places_of
from common.data.download import cache_folder
from common.data.embedded import grid_of, save_bytes, written_whole
from common.data.pairing import generator_for
from common.io import save_field
from common.spatial import few_threads

__all__ = ["LABELS", "ContrastPair", "contrast_cohort", "make_contrast_pair"]

logger = logging.getLogger(__name__)

_NAMES = "background", "rim", "core", "left ventricle", "right ventricle", "left nucleus", "right nucleus", "stem"
LABELS = dict(enumerate(_NAMES))

# Increase whenever the same arguments begin to give other images: the version is part of the folder's name.
VERSION = 1
_SPLITS = {"training": range(24), "validation": range(24, 30), "test": range(30, 46)}
_ATLAS = "contrast_atlas"
_NOISE = 0.015


class ContrastPair(NamedTuple):
    """A subject, the atlas, and the map between them.

    Attributes:
        fixed, moving: images (*S) float32 in [0,1] of the atlas and of the subject.
        fixed_label, moving_label: (*S) uint8, see ``LABELS``.
        fixed_mask, moving_mask: (*S) bool, the anatomy and a little around it.
        true_ddf: (d,*S) float32 voxels: ``moving(x + true_ddf(x))`` is the tissue of ``fixed(x)``.
    """

    fixed: Tensor
    moving: Tensor
    fixed_label: Tensor
    moving_label: Tensor
    fixed_mask: Tensor
    moving_mask: Tensor
    true_ddf: Tensor


def contrast_cohort(
    dataset_dir: str | Path | None = None,
    *,
    spatial_dims: int | None = None,
    spatial_size: int | Sequence[int] | None = None,
    anatomy_seed: int = 0,
    magnitude: float = 1.0,
    contrast: float = 1.0,
) -> Cohort:
    """Load the embedded contrast cohort, writing its files first where they are missing.

    An atlas and 46 subjects: 24 to train, 6 to validate, 16 to test. Every pair is registered to the atlas. Validation
    and test pairs know their ``true_ddf``; all subjects have masks.

    Args:
        dataset_dir: where the cohort's own folder lies or is made. Default: the user's cache folder.
        spatial_dims: 2 or 3. Default: the numbers of ``spatial_size``, else 2.
        spatial_size: grid, at least 32 along each axis. Default: 64 (2-D), 48 (3-D).
        anatomy_seed: of the atlas and of all subjects.
        magnitude: of the deformations; 1 gives a mean Dice before registration of about 0.65.
        contrast: how much the subjects' intensities differ from the atlas's; 0 is not at all.

    Returns:
        the cohort, named ``contrast``, with ``atlas``.

    Raises:
        ValueError: for an impossible dimension, size, magnitude or contrast.
    """
    if spatial_dims is None:
        spatial_dims = len(spatial_size) if isinstance(spatial_size, Sequence) else 2
    size = grid_of(spatial_dims, spatial_size, least=32)
    _check(magnitude, contrast)
    root = Path(dataset_dir).expanduser() if dataset_dir is not None else cache_folder()
    shown = "x".join(str(n) for n in size)
    folder = root / f"contrast_v{VERSION}_{shown}_seed{anatomy_seed}" / f"magnitude{magnitude:g}_contrast{contrast:g}"
    if not (folder / "dataset.json").is_file():
        logger.info("writing the contrast cohort to %s", folder)
        with written_whole(folder, _description(size)) as half_made, few_threads():
            _write(half_made, size, anatomy_seed, magnitude, contrast)
    return cohort_from_json(folder / "dataset.json", folder)


def make_contrast_pair(
    size: Sequence[int],
    *,
    seed: int = 0,
    subject: int = 0,
    magnitude: float = 1.0,
    contrast: float = 1.0,
    noise: float = _NOISE,
) -> ContrastPair:
    """One subject of the cohort, to be registered to the atlas.

    Args:
        size: the grid ``S``, 2-D or 3-D.
        seed: of the cohort: of the atlas.
        subject: number of the subject.
        magnitude: of its deformation; 0 gives the anatomy of the atlas.
        contrast: how much its intensities differ from the atlas's.
        noise: standard deviation of what is added to either image.

    Returns:
        images, labels, masks and the map.

    Raises:
        ValueError: for an impossible magnitude or contrast.
    """
    _check(magnitude, contrast)
    moving, shape = _subject_seen(size, seed, subject, magnitude, contrast, noise)
    (fixed, fixed_label, fixed_mask), (image, label, mask) = _atlas_seen(size, seed, noise), moving
    return ContrastPair(fixed, image, fixed_label, label, fixed_mask, mask, shape.back(places_of(size)))


def _check(magnitude: float, contrast: float) -> None:
    if not 0 <= magnitude <= 1.5:
        raise ValueError(f"magnitude must be in [0, 1.5], beyond which there is no room for more, found {magnitude}")
    if not 0 <= contrast <= 2:
        raise ValueError(f"contrast must be in [0, 2], beyond which tissues are no longer told apart, found {contrast}")


def _seen(anatomy: Anatomy, places: Tensor, scan: Scanner, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Image (*S) float32, label (*S) uint8 and mask (*S) bool of the anatomy at places (d,*S)."""
    levels, texture = anatomy(places)
    label = torch.zeros(texture.shape, dtype=torch.uint8)
    for value, level in enumerate(levels, start=1):
        label[level > 0] = value
    return scan(levels, texture, noise), label, levels[0] > -2 * EDGE


def _atlas_seen(size: Sequence[int], seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Image, label and mask of the atlas."""
    scan = Scanner(len(size), 0.0, generator_for(seed, 0, 7))
    return _seen(Anatomy(len(size), seed), places_of(size), scan, noise)


def _subject_seen(
    size: Sequence[int], seed: int, subject: int, magnitude: float, contrast: float, noise: float
) -> tuple[tuple[Tensor, Tensor, Tensor], Shape]:
    """Image, label and mask of a subject, and its shape."""
    shape = Shape(size, magnitude, generator_for(seed, subject, 5))
    scan = Scanner(len(size), contrast, generator_for(seed, subject, 6))
    return _seen(Anatomy(len(size), seed), shape(places_of(size)), scan, noise), shape


def _write(folder: Path, size: tuple[int, ...], seed: int, magnitude: float, contrast: float) -> None:
    for name in ("masksTr", "fieldsTr"):
        (folder / name).mkdir()
    _save(folder, _ATLAS, *_atlas_seen(size, seed, _NOISE))
    for split, members in _SPLITS.items():
        for subject in members:
            seen, shape = _subject_seen(size, seed, subject, magnitude, contrast, _NOISE)
            _save(folder, _name(subject), *seen)
            if split != "training":
                ddf = shape.back(places_of(size))
                save_field(folder / f"fieldsTr/{_name(subject)}.nii.gz", ddf, np.eye(4), fmt="l2r")


def _save(folder: Path, name: str, image: Tensor, label: Tensor, mask: Tensor) -> None:
    save_bytes(folder / f"imagesTr/{name}.nii.gz", image.numpy(), np.eye(4))
    nib.save(nib.Nifti1Image(label.numpy(), np.eye(4)), folder / f"labelsTr/{name}.nii.gz")
    nib.save(nib.Nifti1Image(mask.numpy().astype(np.uint8), np.eye(4)), folder / f"masksTr/{name}.nii.gz")


def _name(subject: int) -> str:
    return f"contrast_{subject:04d}"


def _subject(name: str) -> dict[str, str]:
    files = {key: f"{key}sTr/{name}.nii.gz" for key in ("image", "label", "mask")}
    return {"id": name, **files}


def _pair(subject: int) -> dict[str, str]:
    pair: dict[str, str] = {}
    for role, name in (("moving", _name(subject)), ("fixed", _ATLAS)):
        pair |= {role if key == "image" else f"{role}_{key}": value for key, value in _subject(name).items()}
    return {**pair, "true_ddf": f"fieldsTr/{_name(subject)}.nii.gz"}


def _description(size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": "contrast",
        "description": "An invented atlas, and subjects of other shape and contrast",
        "licence": "CC0",
        "source": "made by common.data.contrast",
        "tensorImageSize": {"0": f"{len(size)}D"},
        "shape": list(size),
        "spacing": [1.0] * len(size),
        "orientation": "RAS" if len(size) == 3 else None,
        "labels": {str(value): name for value, name in LABELS.items()},
        "atlas": _subject(_ATLAS),
        "training": [_subject(_name(subject)) for subject in _SPLITS["training"]],
        "validation": [_pair(subject) for subject in _SPLITS["validation"]],
        "test": [_pair(subject) for subject in _SPLITS["test"]],
    }
