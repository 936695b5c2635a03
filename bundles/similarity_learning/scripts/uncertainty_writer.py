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
"""What a user takes home of a registration's uncertainty, on the fixed scan's own grid and in mm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.handlers import RegistrationWriter
from common.handlers.registered import RegisteredPair
from common.io import load_image, save_field, save_image
from common.io.fields import field_to_lps
from common.spatial import warp_labels

from .uncertainty import label_disagreement

__all__ = ["UncertaintyWriter"]


class UncertaintyWriter(RegistrationWriter):
    """:class:`common.handlers.RegistrationWriter`, and for a network that gives samples of its field:

    - ``uncertainty.nii.gz``, the standard deviation in mm of where each voxel comes from (the root of the variances
      along all axes), also drawn in ``registration.png``;
    - ``mean_ddf.nii.gz``, the mean of the samples' fields, a displacement field like ``ddf.nii.gz``, which is that of
      the mean velocity;
    - ``std_ddf.nii.gz``, (X, Y, Z, 3), the standard deviations along the axes of the world, in mm;
    - where the pair names a ``moving_label``: ``label_uncertainty.nii.gz``, the standard deviation of the label that
      reaches each voxel, as :func:`~.uncertainty.label_std` has it.

    Every sample is carried to the grid of the fixed file by itself, so the spread is right whatever the orientation and
    size of the voxels that the network saw. The arguments are those of the class that it extends.
    """

    def _write_maps(self, folder: Path, found: RegisteredPair) -> dict[str, Any]:
        drawn = super()._write_maps(folder, found)
        if found.output.get("ddf_samples") is None:
            return drawn
        moving, fixed, source = found.moving, found.fixed, _label(found.pair)
        shape = (fixed.spatial_dims, *fixed.array.shape)
        mean, millimetres, squares = (np.zeros(shape) for _ in range(3))
        labels: list[Tensor] = []
        samples = found.output["ddf_samples"][found.item].split(1)
        for sample in samples:
            ddf = found.on_files(sample)
            moved = field_to_lps(ddf[0].cpu().numpy(), fixed.affine, moving.affine)
            mean += ddf[0].double().cpu().numpy() / len(samples)
            millimetres += moved / len(samples)
            squares += moved**2 / len(samples)
            if source is not None:
                labels.append(warp_labels(source.to(ddf.device), ddf, padding="zeros")[0])
        std = np.sqrt(np.maximum(squares - millimetres**2, 0)).astype(np.float32)
        total = np.sqrt(np.square(std).sum(0))
        save_image(folder / "uncertainty.nii.gz", total, fixed.affine_3d)
        save_field(folder / "mean_ddf.nii.gz", mean, fixed.affine_3d, moving.affine_3d, fmt=self.field_format)
        # Learn2Reg's form is no more than an array with the channel last.
        save_field(folder / "std_ddf.nii.gz", std, fixed.affine_3d, fmt="l2r")
        if labels:
            spread = label_disagreement(torch.stack(labels))[0].cpu().numpy()
            save_image(folder / "label_uncertainty.nii.gz", spread, fixed.affine_3d)
        return drawn | {"uncertainty": torch.from_numpy(total)[None], "uncertainty_unit": "mm"}


def _label(pair: Mapping[str, Any]) -> Tensor | None:
    """The label map of the moving scan, (1, 1, *S); None where the pair names none."""
    if not pair.get("moving_label"):
        return None
    return torch.from_numpy(load_image(pair["moving_label"]).array.astype("int32"))[None, None]
