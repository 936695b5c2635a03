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
"""What a user takes home from a registration: scans, transforms and a picture, on the grids of the user's files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor

from common import __version__
from common.handlers.figures import registration_figure
from common.handlers.output import claim_folder
from common.handlers.pair_report import report_points, write_pair_report
from common.handlers.registered import RegisteredPair
from common.handlers.results import (
    FORMS,
    as_image,
    to_one_scale,
    write_inverse,
    write_jacobian,
    write_map,
    write_moved,
    write_moved_label,
    write_transform,
)
from common.handlers.summary import (
    clear_results,
    files_in_words,
    require_other_folder,
    times_in_words,
    timings_of,
)
from common.io import PairFolders, Scan, load_image, require_label_map
from common.io.label_maps import load_label_map
from common.io.pair_folders import named_columns, write_measures
from common.spatial import Displacement, SpatialTransform, warp_scan

__all__ = ["RegistrationWriter"]

logger = logging.getLogger(__name__)

_DRAWN_MAPS = ("weight_map", "uncertainty")
_INVERSES = ("network", "auto", "none")


class RegistrationWriter:
    """Write each registered pair of an evaluator to a folder.

    The network saw reoriented, padded, normalised images; the files written here are on the grids of the user's files.
    On that of the fixed one:

    - ``moved.nii.gz``, the moving file itself, interpolated once, and ``moved_label.nii.gz`` where the pair names a
      ``moving_label``;
    - ``ddf.nii.gz``, all of the motion as a displacement field that ITK, ANTs and Slicer apply, or ``transform.h5``,
      ITK's composite, in which the affine map that the network started from is a part of its own;
    - ``jacobian.nii.gz``, how much volume of the moving scan each unit of volume takes, 0 and less where the map folds;
    - the network's maps, such as ``weight_map.nii.gz``;
    - ``registration.png``, ``report.html`` if asked for, and at the very end ``metrics.json``.

    On the grid of the moving file lie ``inverse_ddf.nii.gz`` and ``inverse_moved.nii.gz``, the fixed scan brought back;
    ``inverse_transform.h5`` is the way back as a composite. The inverse is the network's own where it gives one, else,
    if asked for, a numerical one, whose residual ``metrics.json`` has as ``inverse_residual_mm``. Beside each transform
    a JSON file of the same name says in words what its numbers mean. Outside of a scan images have the value 0, or the
    scan's lowest where that is negative.

    Several pairs get a folder each, ``<moving_id>_to_<fixed_id>``, or the one that ``folders`` has for their ``id``.
    With ``folders`` a pair that cannot be written is no reason to stop: the output gets the reason as ``error``, for a
    table that is attached after this. A full disk or a folder that cannot be written to is one.

    Args:
        output_dir: folder, made and tried before the first pair.
        pairs: the pairs in the evaluator's order: ``moving`` and ``fixed`` are files, ``moving_label`` and, for the
            report, ``fixed_label``, ``moving_points`` and ``fixed_points`` may be.
        field_format: what is written of the transform: ``"itk"`` or ``"l2r"`` (see :func:`common.io.save_field`),
            ``"composite"``, or a list of these.
        maps: outputs of the network, (B, 1, \\*S) on the fixed grid, that become files where it gives them.
        folders: where the pairs of a list go, see :class:`common.io.PairFolders`.
        inverse: ``"network"`` for the network's own where it gives one, ``"auto"`` for a numerical one where it does
            not, ``"none"`` for none.
        bundle: the bundle's folder or name, for the JSON files and the report.
        report: write ``report.html`` too, a page with everything about the pair.
        columns: what the values of each measure are called, such as labels. Default: as ``folders`` has it.

    Raises:
        ValueError: for an unknown format or kind of inverse; when the evaluator starts, for a label map with fractional
            values, or a scan that a result would replace.
        GridError: when the evaluator starts, for a label map that does not lie on its scan's grid.
        OSError: when the evaluator starts, for a folder that cannot be written to.
    """

    def __init__(
        self,
        output_dir: str | Path,
        pairs: Sequence[Mapping[str, Any]],
        field_format: str | Sequence[str] = "itk",
        maps: Sequence[str] = ("weight_map",),
        folders: PairFolders | None = None,
        inverse: str = "network",
        bundle: str | Path | None = None,
        report: bool = False,
        columns: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.forms = _forms(field_format)
        if inverse not in _INVERSES:
            raise ValueError(f"unknown inverse '{inverse}', expected one of {list(_INVERSES)}")
        self.output_dir = Path(output_dir)
        self.pairs = {_name(pair): pair for pair in pairs}
        self.folders = folders
        self.maps = tuple(maps)
        self.inverse, self.report = inverse, report
        named = columns if columns is not None or folders is None else folders.columns
        self.columns = {name: list(values) for name, values in (named or {}).items()}
        self.made_by = {"made_by": f"WarpZoo {__version__}", **_bundle(bundle)}

    @property
    def field_format(self) -> str:
        """The form of ``ddf.nii.gz``."""
        return next((form for form in self.forms if form != "composite"), "itk")

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
            require_other_folder(self.output_dir, pair)
            if pair.get("moving_label"):
                frame = pair.get("moving_frame")
                require_label_map(load_image(pair["moving"], frame), load_label_map(pair["moving_label"], frame))

    def _write_batch(self, engine: Engine) -> None:
        output = engine.state.output
        if self.folders is not None:
            self._write_listed(self.folders, output)
            return
        for item, names in enumerate(zip(output["moving_id"], output["fixed_id"], strict=True)):
            folder = self.output_dir if len(self.pairs) == 1 else self.output_dir / "_to_".join(names)
            about = self._write(folder, RegisteredPair(self.pairs["_to_".join(names)], output, item))
            measures = _measured(output, item)
            columns = named_columns(measures, self.columns)
            write_measures(folder, measures, {**about, "columns": columns} if columns else about)

    def _write_listed(self, folders: PairFolders, output: dict[str, Any]) -> None:
        for item, name in enumerate(output["id"]):
            if "ddf" not in output:
                if "error" in output:
                    folders.restart(name)  # What an earlier run left there is no result of this one.
                continue
            try:
                require_other_folder(folders.of(name), self.pairs[name])
                folders.restart(name)
                about = self._write(folders.of(name), RegisteredPair(self.pairs[name], output, item))
                folders.finish(self.pairs[name], _measured(output, item), about)
            except OSError:
                raise
            except Exception as error:
                output["error"] = [str(error) or repr(error)] * len(output["id"])

    def _write(self, folder: Path, found: RegisteredPair) -> dict[str, Any]:
        """Write everything but ``metrics.json``; returns what that has to say beside the measures."""
        began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        clear_results(folder)
        image, moved = write_moved(folder, found)
        determinant = write_jacobian(folder, found)
        transform = found.transform()
        back, residual = self._write_transforms(folder, found, transform, int((determinant <= 0).sum()))
        motion = _motion(transform)
        del transform
        maps = self._write_maps(folder, found)
        start = found.start()
        labels = write_moved_label(folder, found, start)
        before = warp_scan(image, start)
        del image, start
        labels |= _fixed_label(found)
        _draw(folder, found, (before, moved, motion), {"determinant": determinant, **labels, **maps})
        timings = timings_of(found) | {"write": time.perf_counter() - began}
        if self.report:
            seen: dict[str, Any] = {"before": before, "moved": moved, "before_label": labels.get("moving_label")}
            seen |= {name: labels.get(name) for name in ("moved_label", "fixed_label")}
            self._write_report(folder, found, seen | report_points(found, back), maps, timings)
            timings["write"] = time.perf_counter() - began
        logger.info("%s: %s", folder, times_in_words(timings))
        if len(self.pairs) == 1:
            logger.info("%s", files_in_words(folder, [*(path.name for path in folder.iterdir()), "metrics.json"]))
        about: dict[str, Any] = {"timings": {name: round(seconds, 3) for name, seconds in timings.items()}}
        about |= {"refinement": found.output["refinement"]} if "refinement" in found.output else {}
        return about if residual is None else {**about, "inverse_residual_mm": residual}

    def _write_report(
        self,
        folder: Path,
        found: RegisteredPair,
        seen: Mapping[str, Any],
        maps: Mapping[str, Any],
        timings: Mapping[str, float],
    ) -> None:
        about: dict[str, Any] = {"columns": self.columns, "timings": timings, "bundle": self.made_by.get("bundle")}
        write_pair_report(folder, found, seen, maps, measures=_measured(found.output, found.item), **about)

    def _write_transforms(
        self, folder: Path, found: RegisteredPair, transform: SpatialTransform, folded: int
    ) -> tuple[SpatialTransform | None, float | None]:
        """Write the ways there and back; returns the way back and, if it is numerical, its residual in mm."""
        files = {f"{role}_file": str(scan.path) for role, scan in (("fixed", found.fixed), ("moving", found.moving))}
        about = {**files, **self.made_by}
        write_transform(folder, found, transform, self.forms, about)
        wanted = self.inverse == "auto" or (self.inverse == "network" and "inverse_ddf" in found.output)
        return write_inverse(folder, found, transform, self.forms, about, folded) if wanted else (None, None)

    def _write_maps(self, folder: Path, found: RegisteredPair) -> dict[str, Any]:
        """Write what the network says beside the field, on the grid of the fixed file; a subclass may write more.

        Args:
            folder: where to.
            found: the pair; ``found.output`` is the evaluator's, of a batch, and ``found.item`` which of it.

        Returns:
            keywords of :func:`registration_figure` for the maps that it draws.
        """
        given = {name: found.output[name][found.item : found.item + 1] for name in self.maps if name in found.output}
        maps = {name: write_map(folder, name, found, seen) for name, seen in given.items()}
        return {name: maps[name] for name in _DRAWN_MAPS if name in maps}


def _fixed_label(found: RegisteredPair) -> dict[str, Tensor]:
    label = found.label("fixed")
    return {} if label is None else {"fixed_label": label[0]}


def _motion(transform: SpatialTransform) -> Tensor:
    """(d, \\*S) what the network found, in voxels of the fixed file: the moving file's axes may run otherwise."""
    (found,) = (part for part in transform.parts if isinstance(part, Displacement))
    return found.ddf[0]


def _draw(folder: Path, found: RegisteredPair, images: tuple[Tensor, Tensor, Tensor], more: Mapping[str, Any]) -> None:
    """``registration.png``.

    Args:
        folder: where to.
        found: the pair.
        images: the moving scan where the network met it and after, (1, 1, \\*S), and :func:`_motion` between the two.
        more: keywords of :func:`registration_figure`.
    """
    before, after, motion = images
    old, new = to_one_scale(before, before, after)
    target = as_image(found.fixed, found.device)
    (target,) = to_one_scale(target, target)
    figure = registration_figure(old[0], target[0], new[0], motion, **more, **_view(found.fixed))
    figure.savefig(folder / "registration.png", dpi=110)


def _view(scan: Scan) -> dict[str, Any]:
    return {"affine": scan.affine_3d} if scan.spatial_dims == 3 else {"spacing": scan.spacing}


def _forms(field_format: str | Sequence[str]) -> tuple[str, ...]:
    forms = dict.fromkeys([field_format] if isinstance(field_format, str) else field_format)
    unknown = [form for form in forms if form not in FORMS]
    if unknown or not forms:
        raise ValueError(f"unknown field_format {unknown}, expected one of {list(FORMS)}, or a list of them")
    return tuple(forms)


def _bundle(bundle: str | Path | None) -> dict[str, str]:
    """Name and version, of a bundle's folder; only the name where there is no such folder."""
    if bundle is None:
        return {}
    metadata = Path(bundle) / "configs/metadata.json"
    version = json.loads(metadata.read_text(encoding="utf-8")).get("version") if metadata.is_file() else None
    name = Path(bundle).resolve().name
    return {"bundle": name} if version is None else {"bundle": f"{name} {version}"}


def _name(pair: Mapping[str, Any]) -> str:
    return str(pair.get("id") or "_to_".join(str(pair.get(f"{role}_id") or role) for role in ("moving", "fixed")))


def _measured(output: Mapping[str, Any], item: int) -> dict[str, list[float]]:
    return {name: values[item].tolist() for name, values in output["metrics"].items()}
