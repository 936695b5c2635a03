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
"""How the moving scan comes to lie on the fixed one before a network sees them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from common.io import PairError, Scan, grid_of, load_transforms
from common.transforms.grids import affine_of

__all__ = ["PairAlignment"]

logger = logging.getLogger(__name__)

KINDS = ("affine", "rigid", "similarity", "centre")
FRAMES = "frames"
_CHOICES = (*KINDS, "none", FRAMES)


class PairAlignment:
    """The affine map from the world of the fixed to that of the moving scan: asked for, read, or none.

    Args:
        affine: "affine", "rigid", "similarity" (rigid and one scale) or "centre" (centres of mass) are found by
            ``aligner``; "none" takes the headers as they are; anything else is a file, or a list of files in the order
            of ``antsApplyTransforms -t``, see :func:`common.io.load_transforms`; ":inverse" after a name inverts it.
        aligner: :func:`common.engines.register_affine`, or what is called as it is. Configs hand it over, since
            transforms know of no optimisation.
        similarity: what ``aligner`` is to maximise.
        device: where it works; None is the processor.

    Raises:
        ValueError: for an unknown word, or when there is nothing to find the map with.
        FileNotFoundError: for a file that is not there.
    """

    def __init__(
        self,
        affine: str | Path | Sequence[str | Path],
        aligner: Callable[..., Any] | None = None,
        similarity: str = "ncc",
        device: str | torch.device | None = None,
    ) -> None:
        self.kind = affine if isinstance(affine, str) and affine in _CHOICES else ""
        self.files = [] if self.kind else _files(affine)
        if self.kind in KINDS and aligner is None:
            raise ValueError(f"affine '{self.kind}' needs an aligner, such as common.engines.register_affine")
        self.aligner, self.similarity, self.device = aligner, similarity, device

    @property
    def source(self) -> str:
        """The files, in words."""
        return ", ".join(self.files)

    def known(self, moving: Scan, fixed: Scan) -> np.ndarray | None:
        """The map, (d+1, d+1) float64, as far as it is known beforehand.

        Raises:
            TransformError: for a file that is no transform.
            PairError: for one that is no affine map, or of another dimension; names it.
        """
        dims = fixed.spatial_dims
        if self.kind == "none":
            return np.eye(dims + 1)
        if not self.files:
            return None
        transform = load_transforms(self.files, fixed=grid_of(fixed), moving=grid_of(moving))
        if transform.matrix is None:
            raise PairError(
                f"{self.source} holds a displacement field, but `affine` takes affine maps only; leave the field out, "
                "the network finds its own"
            )
        if transform.spatial_dims != dims:
            raise PairError(
                f"{self.source} is a map in {transform.spatial_dims}-D, but {fixed.path} is {dims}-D: expected one for "
                "these two scans"
            )
        return transform.matrix.numpy()

    def find(self, moving: MetaTensor, fixed: MetaTensor) -> tuple[np.ndarray, str]:
        """The map by optimisation, (d+1, d+1) float64, and how good it is, in words.

        Args:
            moving: (1, *Sm).
            fixed: (1, *Sf).
        """
        assert self.aligner is not None
        images = [image.as_tensor()[None].to(self.device) for image in (moving, fixed)]
        affines = affine_of(moving), affine_of(fixed)
        found = self.aligner(*images, *affines, kind=self.kind, similarity=self.similarity)
        said = (
            f"{self.kind}: {self.similarity} {found.before:.4f} before, {found.after:.4f} after; "
            f"{found.overlap:.0%} of the fixed scan's foreground lies in the moving scan"
        )
        logger.info("affine alignment, %s", said)
        return np.asarray(found.matrix, dtype=np.float64), said

    @property
    def in_words(self) -> str:
        """What is done, where nothing is sought."""
        if self.kind == FRAMES:
            return "frames: the middles of both scans on each other"
        return "none: the scans lie as their headers say" if self.kind == "none" else f"read from {self.source}"


def _files(affine: Any) -> list[str]:
    """The files as a list of names.

    Raises:
        ValueError: for what is no name.
        FileNotFoundError: for what is no file.
    """
    names = [affine] if isinstance(affine, (str, os.PathLike)) else affine
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, (str, os.PathLike)) for name in names):
        raise ValueError(f"affine must be one of {list(_CHOICES)}, a file or a list of files, got {affine!r}")
    files = [str(name) for name in names]
    for name in files:
        if not Path(name.removesuffix(":inverse")).is_file():
            raise FileNotFoundError(f"affine {name!r}: no such file, and none of {list(_CHOICES)}")
    return files
