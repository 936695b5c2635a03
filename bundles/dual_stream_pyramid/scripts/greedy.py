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
"""Greedy, the classical registration that learned methods are compared with, in the place of a network."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.networks import RegistrationNetwork, crop_to
from common.spatial import compose

__all__ = ["Greedy"]

# ITK's smoothing wants four voxels an axis in the coarsest image of the pyramid.
_COARSEST = 4
_WINDOWED = ("NCC", "WNCC")
_METRICS = (*_WINDOWED, "SSD", "MI", "NMI")


class Greedy(RegistrationNetwork):
    """Greedy diffeomorphic registration by PICSL's package of that name, on the CPU.

    Nothing is trained and there are no weights: ``fields`` runs the whole optimisation for each pair. It gives "ddf"
    and, if asked for, "inverse_ddf". Needs ``pip install picsl_greedy``.
    Source: Yushkevich et al., Fast automatic segmentation of hippocampal subfields and medial temporal lobe subregions
    in 3 Tesla and 7 Tesla T2-weighted MRI, Alzheimer's & Dementia 2016. The defaults are those of the command
    ``greedy -m WNCC 2x2x2 -n 100x100x40 -s 1.5mm 0.5mm``.

    Args:
        spatial_dims: 2 or 3.
        metric: "WNCC" or "NCC" (local correlation in a window), "SSD", "MI" or "NMI".
        radius: of the window, voxels.
        iterations: of each level, coarse to fine; every level doubles the resolution.
        smoothing: standard deviations in mm: of each step, and of the field after it.
        affine: align by 12 degrees of freedom (6 in 2-D) first; the field holds both.
        affine_iterations: of each level of that.
        spacing: voxel size in mm, one number or one an axis; None is 1 mm.
        inverse: also give the field from moving to fixed, which takes about a quarter more time.
        threads: of Greedy; None is as many as PyTorch's.
        seed: of the noise that Greedy adds to the images and of its affine start; not 0, with which it draws its own.

    Raises:
        ImportError: when the package is not installed; says how to.
        ValueError: for an unknown metric, a spacing that does not fit, or seed 0.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        *,
        metric: str = "WNCC",
        radius: int = 2,
        iterations: Sequence[int] = (100, 100, 40),
        smoothing: Sequence[float] = (1.5, 0.5),
        affine: bool = False,
        affine_iterations: Sequence[int] = (100, 50, 10),
        spacing: float | Sequence[float] | None = None,
        inverse: bool = False,
        threads: int | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(spatial_dims)
        if metric not in _METRICS:
            raise ValueError(f"metric must be one of {_METRICS}, got {metric!r}")
        if seed < 1:
            raise ValueError(f"seed must be at least 1, got {seed}: with 0 Greedy's result differs from run to run")
        window = " " + "x".join([str(radius)] * spatial_dims) if metric in _WINDOWED else ""
        self.metric = metric + window
        self.levels = "x".join(map(str, iterations))
        self.affine_levels = "x".join(map(str, affine_iterations))
        self.smoothing = "{}mm {}mm".format(*smoothing)
        self.smallest = _COARSEST * 2 ** (max(len(iterations), len(affine_iterations) if affine else 0) - 1)
        self.affine, self.inverse, self.threads, self.seed = affine, inverse, threads, seed
        self.spacing = _spacing(spacing, spatial_dims)
        self._tool, self._to_scan, self._from_scan = _load(spatial_dims)

    def fields(self, image: Tensor) -> dict[str, Any]:
        """Register each pair of ``image`` (B, 2, *S); see the class."""
        checked, size = self.padded(image, 1), image.shape[2:]
        if image.shape[1] != 2:
            raise ValueError(f"Greedy registers images of one channel, got a pair with {image.shape[1]} channels")
        pairs = _at_least(checked.detach().cpu(), self.smallest).double().numpy()
        found = [self._register(moving, fixed) for moving, fixed in pairs]
        stacked = {name: torch.cat([fields[name] for fields in found]) for name in found[0]}
        return {name: crop_to(field, size).float().to(image.device) for name, field in stacked.items()}

    def _register(self, moving: np.ndarray, fixed: np.ndarray) -> dict[str, Tensor]:
        """Fields (1, d, *S) float64 in voxels of one pair of images (*S)."""
        tool, matrix, start = self._tool(), np.eye(self.spatial_dims + 1), ""
        # Greedy adds noise to the images that it is given, in place: every command gets its own.
        if self.affine:
            self._run(tool, moving, fixed, f"-a -dof 12 -n {self.affine_levels} -o affine", "affine")
            matrix, start = _ras_to_lps(np.asarray(tool["affine"])), "-it affine "
        inverse = " -oinv inverse" if self.inverse else ""
        # Without -wp 0 the field would be rounded to a tenth of a voxel.
        what = f"{start}-n {self.levels} -s {self.smoothing} -wp 0 -o warp{inverse}"
        self._run(tool, moving, fixed, what, "warp", *(["inverse"] if self.inverse else []))
        # Warp first, then affine: where a voxel of the fixed image comes from.
        fields = {"ddf": _after(matrix, self._displacement(tool["warp"]), self.spacing)}
        if self.inverse:
            still = torch.zeros_like(fields["ddf"])
            back = _after(np.linalg.inv(matrix), still, self.spacing)
            fields["inverse_ddf"] = compose(_in_voxels(self._displacement(tool["inverse"]), self.spacing), back)
        return fields

    def _run(self, tool: Any, moving: np.ndarray, fixed: np.ndarray, what: str, *results: str) -> None:
        threads = torch.get_num_threads() if self.threads is None else self.threads
        command = f"-V 0 -seed {self.seed} -threads {threads} -i fixed moving -m {self.metric} {what}"
        scans = {"fixed": self._to_scan(fixed, self.spacing), "moving": self._to_scan(moving, self.spacing)}
        chatter = io.StringIO()
        try:
            tool.execute(command, out=chatter, err=chatter, **scans, **dict.fromkeys(results))
        except RuntimeError as error:
            raise RuntimeError(f"Greedy failed at '{command}': {error}\n{chatter.getvalue()[-500:]}") from error

    def _displacement(self, warp: Any) -> Tensor:
        """(1, d, *S) in mm along array axes, which are those of ITK here."""
        values = self._from_scan(warp)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(-1, *range(self.spatial_dims - 1, -1, -1))))[None]


def _load(spatial_dims: int) -> tuple[Any, Any, Any]:
    """Greedy's class, and what brings arrays (*S) to its images and its images to arrays of reversed axes."""
    try:
        import picsl_greedy
        import SimpleITK
    except ImportError as error:
        raise ImportError(
            "Greedy needs the package picsl_greedy (with SimpleITK), which is not installed: "
            "pip install -c constraints.txt picsl_greedy"
        ) from error

    def to_scan(array: np.ndarray, spacing: Sequence[float]) -> Any:
        scan = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
        scan.SetSpacing(list(spacing))
        return scan

    tools = {2: picsl_greedy.Greedy2D, 3: picsl_greedy.Greedy3D}
    return tools[spatial_dims], to_scan, SimpleITK.GetArrayFromImage


def _spacing(spacing: float | Sequence[float] | None, spatial_dims: int) -> tuple[float, ...]:
    values = (spacing or 1.0,) * spatial_dims if spacing is None or isinstance(spacing, (int, float)) else spacing
    if len(values) != spatial_dims or min(values) <= 0:
        raise ValueError(f"spacing must be one positive number or {spatial_dims}, got {spacing}")
    return tuple(float(value) for value in values)


def _at_least(pairs: Tensor, smallest: int) -> Tensor:
    """Repeat the last voxel of axes that are too short for the pyramid."""
    missing = [max(smallest - n, 0) for n in pairs.shape[2:]]
    return F.pad(pairs, [n for m in reversed(missing) for n in (0, m)], mode="replicate") if any(missing) else pairs


def _ras_to_lps(matrix: np.ndarray) -> np.ndarray:
    """Greedy's matrices are in RAS mm, its warps along ITK's axes; in 2-D, too, both axes are turned."""
    flip = np.diag([-1.0, -1.0, *[1.0] * (len(matrix) - 2)])
    result: np.ndarray = flip @ matrix @ flip
    return result


def _in_voxels(displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    return displacement / torch.tensor(spacing, dtype=torch.float64).view(-1, *[1] * len(spacing))


def _after(matrix: np.ndarray, displacement: Tensor, spacing: Sequence[float]) -> Tensor:
    """The displacement in voxels of a displacement in mm, and a matrix (d+1, d+1) in mm after it.

    ``A (x + w) + t - x`` is written as ``(A - 1) x + A w + t``, so that large coordinates are not subtracted.
    """
    d = len(spacing)
    linear, shift = torch.from_numpy(matrix[:d, :d]), torch.from_numpy(matrix[:d, d])
    axes = [torch.arange(n, dtype=torch.float64) * s for n, s in zip(displacement.shape[2:], spacing, strict=True)]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    moved = torch.einsum("ij,j...->i...", linear - torch.eye(d), positions)
    moved = moved + torch.einsum("ij,j...->i...", linear, displacement[0]) + shift.view(-1, *[1] * d)
    return _in_voxels(moved, spacing)[None]
