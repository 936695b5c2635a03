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
"""What a user takes home from a registration: the moved scan, the field and a picture, on the fixed scan's own grid."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import Tensor

from common.handlers.figures import registration_figure
from common.handlers.output import claim_folder
from common.io import PairFolders, Scan, load_image, require_label_map, save_field, save_image
from common.io.fields import FIELD_FORMATS
from common.spatial import affine_to_ddf, warp, warp_labels
from common.spatial.world import field_on_grid

__all__ = ["RegistrationWriter"]

logger = logging.getLogger(__name__)

_DRAWN_MAPS = ("weight_map", "uncertainty")


class RegistrationWriter:
    """Write each registered pair of an evaluator to a folder.

    The network saw reoriented, padded, normalised images; the files written here are on the grid of the fixed file,
    and the moved scan is the moving file itself, interpolated once. A pair gets ``moved.nii.gz``, ``ddf.nii.gz`` (a
    displacement field that ITK, ANTs and Slicer apply), ``registration.png``, ``metrics.json`` and, when the pair
    names one, ``moved_label.nii.gz``. If the network also gives the inverse field, ``inverse_ddf.nii.gz`` and
    ``inverse_moved.nii.gz``, the fixed scan brought back, lie on the grid of the moving file. A map that the network
    gives, such as ``weight_map.nii.gz``, is resampled to the grid of the fixed file. Several pairs get a folder each,
    ``<moving_id>_to_<fixed_id>``, or the one that ``folders`` has for their ``id``.

    With ``folders`` a pair that cannot be written is no reason to stop: the output gets the reason as ``error``, for a
    table that is attached after this. A full disk or a folder that cannot be written to is one.

    Args:
        output_dir: folder, made and tried before the first pair.
        pairs: the pairs in the evaluator's order: ``moving`` and ``fixed`` are files, ``moving_label`` may be.
        field_format: ``"itk"`` or ``"l2r"``, see :func:`common.io.save_field`.
        maps: outputs of the network, (B, 1, \\*S) on the fixed grid, that become files where it gives them.
        folders: where the pairs of a list go, see :class:`common.io.PairFolders`.

    Raises:
        ValueError: for an unknown format; when the evaluator starts, for a label map with fractional values.
        GridError: when the evaluator starts, for a label map that does not lie on its scan's grid.
        OSError: when the evaluator starts, for a folder that cannot be written to.
    """

    def __init__(
        self,
        output_dir: str | Path,
        pairs: Sequence[Mapping[str, Any]],
        field_format: str = "itk",
        maps: Sequence[str] = ("weight_map",),
        folders: PairFolders | None = None,
    ) -> None:
        if field_format not in FIELD_FORMATS:
            raise ValueError(f"unknown field_format '{field_format}', expected one of {list(FIELD_FORMATS)}")
        self.output_dir = Path(output_dir)
        self.pairs = {_name(pair): pair for pair in pairs}
        self.folders = folders
        self.field_format = field_format
        self.maps = tuple(maps)

    def attach(self, engine: Engine) -> None:
        """Follow an evaluator."""
        engine.add_event_handler(Events.STARTED, self._check)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write_batch)

    def _check(self, engine: Engine) -> None:
        """Find out now what would fail, or give wrong labels, after the network has worked."""
        claim_folder(self.output_dir)
        if self.folders is not None:
            return  # The maps of a list are looked at pair by pair, when each is loaded.
        for pair in self.pairs.values():
            if pair.get("moving_label"):
                require_label_map(pair["moving"], pair["moving_label"])

    def _write_batch(self, engine: Engine) -> None:
        output = engine.state.output
        if self.folders is not None:
            self._write_listed(self.folders, output)
            return
        for item, names in enumerate(zip(output["moving_id"], output["fixed_id"], strict=True)):
            folder = self.output_dir if len(self.pairs) == 1 else self.output_dir / "_to_".join(names)
            self._write(folder, self.pairs["_to_".join(names)], output, item)
            metrics = {k: [None if v != v else v for v in row] for k, row in _measured(output, item).items()}
            # JSON has no NaN: what could not be measured is null.
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            logger.info("wrote %s", folder)

    def _write_listed(self, folders: PairFolders, output: dict[str, Any]) -> None:
        for item, name in enumerate(output["id"]):
            if "ddf" not in output:
                if "error" in output:
                    folders.restart(name)  # What an earlier run left there is no result of this one.
                continue
            try:
                folders.restart(name)
                self._write(folders.of(name), self.pairs[name], output, item)
                folders.finish(self.pairs[name], _measured(output, item))
                logger.info("wrote %s", folders.of(name))
            except OSError:
                raise
            except Exception as error:
                output["error"] = [str(error) or repr(error)] * len(output["id"])

    def _write(self, folder: Path, pair: Mapping[str, Any], output: Mapping[str, Any], item: int) -> None:
        moving, fixed = load_image(pair["moving"]), load_image(pair["fixed"])
        seen = output["ddf"][item : item + 1]
        old = output["fixed_affine"][item], output["moving_affine"][item]
        new = fixed.array.shape, torch.from_numpy(fixed.affine), torch.from_numpy(moving.affine)
        ddf, start = field_on_grid(seen, *old, *new), field_on_grid(torch.zeros_like(seen), *old, *new)
        image = _image(moving, seen.device)
        moved = warp(image, ddf, padding="zeros")
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / "moved.nii.gz", moved[0, 0].cpu().numpy(), fixed.affine_3d)
        save_field(folder / "ddf.nii.gz", ddf, fixed.affine_3d, moving.affine_3d, fmt=self.field_format)
        if "inverse_ddf" in output:
            inverse = output["inverse_ddf"][item : item + 1]
            _write_inverse(folder, inverse, old, (moving, fixed), self.field_format)
        maps = self._write_maps(folder, pair, output, item, (moving, fixed))
        # Before registration: where the network met the moving scan, which is the centres of both grids together.
        before = warp(image, start, padding="zeros")
        old_image, new_image = _to_one_scale(image, before, moved)
        target = _image(fixed, seen.device)
        (target,) = _to_one_scale(target, target)
        labels: dict[str, Any] = _moved_labels(folder, pair, ddf, start, fixed) if pair.get("moving_label") else {}
        view = {**labels, **maps, **_view(fixed)}
        figure = registration_figure(old_image[0], target[0], new_image[0], ddf[0], **view)
        figure.savefig(folder / "registration.png", dpi=110)

    def _write_maps(
        self,
        folder: Path,
        pair: Mapping[str, Any],
        output: Mapping[str, Any],
        item: int,
        scans: tuple[Scan, Scan],
    ) -> dict[str, Any]:
        """Write what the network says beside the field, on the grid of the fixed file; a subclass may write more.

        Args:
            folder: where to.
            pair: the files.
            output: the evaluator's, of a batch.
            item: which of the batch.
            scans: moving and fixed.

        Returns:
            keywords of :func:`registration_figure` for the maps that it draws.
        """
        given = {name: output[name][item : item + 1] for name in self.maps if name in output}
        affine = output["fixed_affine"][item]
        maps = {name: _write_map(folder, name, seen, affine, scans[1]) for name, seen in given.items()}
        return {name: maps[name] for name in _DRAWN_MAPS if name in maps}


def _write_inverse(
    folder: Path, seen: Tensor, affines: tuple[Tensor, Tensor], scans: tuple[Scan, Scan], field_format: str
) -> None:
    """Write the inverse field and the fixed scan that it moves on the moving scan's grid.

    Args:
        folder: where to.
        seen: (1, d, *S), as the network gave it.
        affines: of the fixed and of the moving image that the network saw.
        scans: moving and fixed.
        field_format: of the field.
    """
    (fixed_affine, moving_affine), (moving, fixed) = affines, scans
    grids = torch.from_numpy(moving.affine), torch.from_numpy(fixed.affine)
    field = field_on_grid(seen, moving_affine, fixed_affine, moving.array.shape, *grids)
    back = warp(_image(fixed, seen.device), field, padding="zeros")
    save_field(folder / "inverse_ddf.nii.gz", field, moving.affine_3d, fixed.affine_3d, fmt=field_format)
    save_image(folder / "inverse_moved.nii.gz", back[0, 0].cpu().numpy(), moving.affine_3d)


def _write_map(folder: Path, name: str, seen: Tensor, affine: Tensor, fixed: Scan) -> Tensor:
    """Resample a map (1, 1, *S) from the fixed grid that the network saw to that of the file; write it, (1, *S)."""
    to_seen = torch.linalg.solve(affine.double().cpu(), torch.from_numpy(fixed.affine)).float()
    on_file = warp(seen.float(), affine_to_ddf(to_seen, fixed.array.shape).to(seen.device))[0]
    save_image(folder / f"{name}.nii.gz", on_file[0].cpu().numpy(), fixed.affine_3d)
    return on_file


def _moved_labels(folder: Path, pair: Mapping[str, Any], ddf: Tensor, start: Tensor, fixed: Scan) -> dict[str, Tensor]:
    """Write the label map of the moving scan on the fixed grid; return it before and after, for the picture."""
    volume = torch.from_numpy(load_image(pair["moving_label"]).array.astype("int32"))[None, None].to(ddf.device)
    before, after = (warp_labels(volume, field, padding="zeros")[0] for field in (start, ddf))
    save_image(folder / "moved_label.nii.gz", after[0].cpu().numpy(), fixed.affine_3d)
    return {"moving_label": before, "moved_label": after}


def _to_one_scale(reference: Tensor, *images: Tensor) -> list[Tensor]:
    """Bring percentiles of the reference to 0 and 1, so that scans of different range can be compared by eye."""
    low, high = (float(value) for value in np.percentile(reference.cpu().numpy(), (0.5, 99.5)))
    return [((image - low) / max(high - low, 1e-12)).clamp(0, 1) for image in images]


def _name(pair: Mapping[str, Any]) -> str:
    return str(pair.get("id") or "_to_".join(str(pair.get(f"{role}_id") or role) for role in ("moving", "fixed")))


def _measured(output: Mapping[str, Any], item: int) -> dict[str, list[float]]:
    return {name: values[item].tolist() for name, values in output["metrics"].items()}


def _image(scan: Scan, device: torch.device) -> Tensor:
    return torch.from_numpy(scan.array.astype("float32"))[None, None].to(device)


def _view(scan: Scan) -> dict[str, Any]:
    return {"affine": scan.affine_3d} if scan.spatial_dims == 3 else {"spacing": scan.spacing}
