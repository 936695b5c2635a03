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
"""Handlers that draw registered pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image
from torch import Tensor

from common.handlers.figures import figure_to_array, registration_figure
from common.handlers.output import engine_output, is_first_rank
from common.spatial import warp, warp_labels

__all__ = ["PictureHandler", "PictureSaver", "pair_name"]

_NEEDED = ("moving", "fixed", "ddf")
_MAPS = ("weight_map", "uncertainty")


def pair_name(output: Mapping[str, Any], item: int, number: int) -> str:
    """A file name for one pair: ``<moving>_to_<fixed>``, or ``pair_<number>`` for pairs without ids."""
    ids = [output.get(key) for key in ("moving_id", "fixed_id")]
    if any(values is None for values in ids):
        return f"pair_{number:04d}"
    moving, fixed = (re.sub(r"[^\w.-]+", "_", str(values[item])).strip("._") or "id" for values in ids if values)
    return f"{moving}_to_{fixed}"


def _item(output: Mapping[str, Any], item: int) -> dict[str, Tensor]:
    """One pair's tensors on the CPU, with what a trainer may not have needed: the moved image and label."""
    names = (*_NEEDED, "moved", "moving_label", "fixed_label", "moved_label", *_MAPS)
    batch = {name: output[name][item : item + 1].detach() for name in names if output.get(name) is not None}
    if "moved" not in batch:
        batch["moved"] = warp(batch["moving"], batch["ddf"])
    if "moving_label" in batch and "moved_label" not in batch:
        batch["moved_label"] = warp_labels(batch["moving_label"], batch["ddf"])
    return {name: value[0].cpu() for name, value in batch.items()}


class PictureHandler:
    """Draw the first pairs of an epoch; a subclass says where the pictures go.

    A ``weight_map`` or an ``uncertainty`` (in voxels) that a network gives is drawn too.

    Args:
        every: epochs between two sets of pictures.
        count: pictures per epoch; 0 for none.
        spacing: mm per axis, for the shape of the pictures.
        affine: (4, 4) voxel-to-world matrix (RAS mm) of all fixed images, for anatomical views; without it an
            ``affine`` in the batch's ``fixed_meta`` is used where there is one.
        dpi: dots per inch.
    """

    def __init__(self, every: int = 1, count: int = 1, spacing: Any = None, affine: Any = None, dpi: int = 110) -> None:
        if every < 1 or count < 0:
            raise ValueError(f"every must be at least 1 and count at least 0, got {every} and {count}")
        self.every, self.count, self.dpi = every, count, dpi
        self.spacing, self.affine = spacing, affine
        self._drawn = 0

    def attach(self, engine: Engine) -> None:
        """Follow a trainer or an evaluator; only the first rank draws."""
        if is_first_rank():
            engine.add_event_handler(Events.EPOCH_STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._draw)

    def _start(self, engine: Engine) -> None:
        self._drawn = 0

    def _draw(self, engine: Engine) -> None:
        if self._drawn >= self.count or engine.state.epoch % self.every:
            return
        output = engine_output(engine)
        missing = [key for key in _NEEDED if not isinstance(output.get(key), Tensor)]
        if missing:
            raise KeyError(f"a picture needs {missing}; the engine's output has {sorted(output)}")
        for item in range(min(len(output["ddf"]), self.count - self._drawn)):
            name = pair_name(output, item, self._drawn)
            title = f"{name.replace('_to_', ' to ')}, epoch {engine.state.epoch}"
            affine = self._affine(output, item)
            figure = registration_figure(**_item(output, item), title=title, spacing=self.spacing, affine=affine)
            self._keep(figure_to_array(figure, self.dpi), engine, self._drawn, name)
            self._drawn += 1

    def _affine(self, output: Mapping[str, Any], item: int) -> Any:
        if self.affine is not None:
            return self.affine
        meta = output.get("fixed_meta")
        affines = meta.get("affine") if isinstance(meta, Mapping) else None
        return None if affines is None else np.asarray(torch.as_tensor(affines[item]).cpu())

    def _keep(self, picture: np.ndarray, engine: Engine, index: int, name: str) -> None:
        raise NotImplementedError


class PictureSaver(PictureHandler):
    """Save :func:`common.handlers.figures.registration_figure` of the first pairs of an epoch as PNG.

    Files are ``<output_dir>/epoch_0003_<moving>_to_<fixed>.png``; an evaluator outside training is at epoch 1.

    Args:
        output_dir: folder, made when there is something to write.
        every: epochs between two sets of pictures.
        count: pictures per epoch; 0 for none.
        spacing: mm per axis, for the shape of the pictures.
        affine: (4, 4) voxel-to-world matrix (RAS mm) of all fixed images, for anatomical views; without it an
            ``affine`` in the batch's ``fixed_meta`` is used where there is one.
        dpi: dots per inch.

    Example:
        ``PictureSaver("output/pictures", count=4).attach(evaluator)``
    """

    def __init__(
        self,
        output_dir: str | Path,
        every: int = 1,
        count: int = 4,
        spacing: Any = None,
        affine: Any = None,
        dpi: int = 110,
    ) -> None:
        super().__init__(every=every, count=count, spacing=spacing, affine=affine, dpi=dpi)
        self.output_dir = Path(output_dir)

    def _keep(self, picture: np.ndarray, engine: Engine, index: int, name: str) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(self.output_dir / f"epoch_{engine.state.epoch:04d}_{name}.png")
