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
"""One figure that shows whether a registration is any good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from common.handlers.views import (
    FOLD_COLOUR,
    GRID_COLOUR,
    JACOBIAN_COLOURS,
    LABEL_COLOURS,
    PLANE_NAMES,
    PLANE_SIDES,
    first_channel,
    to_array,
    to_ras,
)
from common.spatial import jacobian_determinant

__all__ = ["FOLD_COLOUR", "GRID_COLOUR", "LABEL_COLOURS", "figure_to_array", "registration_figure"]

Array = NDArray[Any]

_TITLES = {
    "moving": "moving",
    "fixed": "fixed",
    "moved": "moved",
    "before": "|moving − fixed|",
    "after": "|moved − fixed|",
    "grid": "warped grid",
    "jacobian": "log det J",
}
# Panels that are drawn where a network gives such a map: title, colours.
_MAPS = {"weight": ("weight map", "viridis"), "uncertainty": ("uncertainty", "inferno")}

# Inches.
_WIDTH, _GAP, _LEFT, _HEAD, _TITLE, _FOOT = 2.1, 0.06, 0.32, 0.28, 0.32, 0.62


@dataclass(frozen=True)
class _Slice:
    """One slice of everything that is drawn: arrays (rows up, columns right)."""

    images: dict[str, Array]
    labels: dict[str, Array]
    position: tuple[Array, Array]
    determinant: Array
    millimetres: tuple[float, float]
    name: str
    sides: Sequence[str] | None

    @property
    def ratio(self) -> float:
        """Height over width on paper."""
        rows, columns = self.determinant.shape
        return rows * self.millimetres[1] / (columns * self.millimetres[0])

    def difference(self, name: str) -> Array:
        """Absolute difference between an image and the fixed one."""
        return np.abs(self.images[name].astype(float) - self.images["fixed"])


def registration_figure(
    moving: Tensor,
    fixed: Tensor,
    moved: Tensor,
    ddf: Tensor,
    moving_label: Tensor | None = None,
    fixed_label: Tensor | None = None,
    moved_label: Tensor | None = None,
    title: str | None = None,
    *,
    weight_map: Tensor | None = None,
    uncertainty: Tensor | None = None,
    uncertainty_unit: str = "voxels",
    determinant: Tensor | None = None,
    spacing: Any = None,
    affine: Any = None,
) -> Figure:
    """Draw one registered pair.

    Rows are slices: the one image in 2-D, three orthogonal ones in 3-D, through the centre of the fixed labels or else
    of the image. Columns:

    - moving, fixed, moved. Label outlines where there are labels; on the moved image solid lines are the warped
      labels and dashed ones the fixed labels. Moving and moved share one grey scale, fixed has its own.
    - absolute difference to fixed before and after, on one scale.
    - the warped grid on the moved image. A regular grid painted onto the *moving* image is carried along by the
      warping: the lines are where a component of ``x + ddf(x)`` takes the values 0, s, 2s, ... It is not a grid pushed
      along ``ddf``, which would show the inverse. Displacement across the slice is not visible in it.
    - logarithm of the Jacobian determinant of ``x + ddf(x)``, or of the one that is given, positive where a fixed voxel
      draws from more than one voxel of moving, that is where moving tissue shrinks. Voxels with a determinant of 0 or
      less are red.
    - the weight map of the smoothness, where there is one, from 0 (dark) to 1.
    - the uncertainty of the field, where there is one: the standard deviation of where a voxel comes from.

    Without ``affine`` array axes run right and up. With it the slices are sagittal, coronal and axial as radiologists
    see them, the patient's right on the left, and letters say so.

    Args:
        moving: (C, \\*S) or (\\*S) image, of which the first channel is drawn. When its size is not that of the fixed
            image it is cropped or extended to that, voxel by voxel as a field of 0 would.
        fixed: likewise.
        moved: the moving image warped by ``ddf``.
        ddf: (d, \\*S) field in voxels of the fixed grid, d = 2 or 3.
        moving_label, fixed_label, moved_label: (1, \\*S) or (\\*S) label maps.
        title: a line above all.
        weight_map: (1, \\*S) or (\\*S) map of the local weight of the smoothness, on the fixed grid.
        uncertainty: likewise, the standard deviation of the displacement; 0 is dark, the scale is the picture's own.
        uncertainty_unit: what it is in.
        determinant: (\\*S) the Jacobian determinant to draw, where that of ``ddf`` is not the whole of it.
        spacing: mm per axis, for the shape of the panels; ``affine`` beats it.
        affine: (4, 4) voxel-to-world matrix of the fixed image, RAS mm; for 3-D.

    Returns:
        a figure that no pyplot state knows of; :func:`figure_to_array` gives its pixels.

    Raises:
        ValueError: when the field has another form.
    """
    field = to_array(ddf)
    if field.ndim > 3 and field.shape[0] == 1 and field.shape[1] == field.ndim - 2:
        field = field[0]
    dims = field.shape[0]
    if dims not in (2, 3) or field.ndim != dims + 1:
        raise ValueError(f"ddf must be (d, *S) with d = 2 or 3 spatial axes, got {tuple(ddf.shape)}")
    given = {"moving": moving_label, "fixed": fixed_label, "moved": moved_label}
    labels = {name: first_channel(label, field.shape[1:]) for name, label in given.items() if label is not None}
    images = {"moving": moving, "fixed": fixed, "moved": moved}
    maps = {"weight": weight_map, "uncertainty": uncertainty, "determinant": determinant}
    images |= {name: image for name, image in maps.items() if image is not None}
    volumes = {name: first_channel(image, field.shape[1:]) for name, image in images.items()}
    millimetres = np.ones(dims) * np.asarray(1.0 if spacing is None else spacing, dtype=float)
    anatomical = affine is not None and dims == 3
    if anatomical:
        volumes, labels, field, millimetres = to_ras(volumes, labels, field, np.asarray(affine, dtype=float))
    slices = _slices(volumes, labels, field, millimetres, anatomical)
    return _draw(slices, title, uncertainty_unit)


def figure_to_array(figure: Figure, dpi: int = 110) -> NDArray[np.uint8]:
    """Render a figure without a display.

    Returns:
        (height, width, 3) pixels.
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _slices(
    volumes: dict[str, Array], labels: dict[str, Array], field: Array, millimetres: Array, anatomical: bool
) -> list[_Slice]:
    if field.shape[0] == 2:
        return [_slice(volumes, labels, field, millimetres, None, [], anatomical)]
    centre = _centre(labels.get("fixed"), field.shape[1:])
    planes = (2, 1, 0) if anatomical else (0, 1, 2)
    return [_slice(volumes, labels, field, millimetres, plane, centre, anatomical) for plane in planes]


def _centre(label: Array | None, shape: Sequence[int]) -> list[int]:
    """The middle of the labels, or of the grid."""
    if label is None or not (label > 0).any():
        return [n // 2 for n in shape]
    inside = label > 0
    others = [tuple(k for k in range(len(shape)) if k != axis) for axis in range(len(shape))]
    counts = [inside.sum(axis=other) for other in others]
    return [round(float((np.arange(len(c)) * c).sum() / c.sum())) for c in counts]


def _slice(
    volumes: Mapping[str, Array],
    labels: Mapping[str, Array],
    field: Array,
    millimetres: Array,
    plane: int | None,
    centre: Sequence[int],
    anatomical: bool,
) -> _Slice:
    shown = [axis for axis in range(field.shape[0]) if axis != plane]

    def cut(volume: Array) -> Array:
        return (volume if plane is None else np.take(volume, centre[plane], axis=plane)).T

    flat = [cut(field[axis]) for axis in shown]
    columns, rows = np.arange(flat[0].shape[1]), np.arange(flat[0].shape[0])
    name, sides = "", None
    if plane is not None:
        name = PLANE_NAMES[plane] if anatomical else f"axis {plane} = {centre[plane]}"
        sides = PLANE_SIDES[plane] if anatomical else None
    return _Slice(
        images={key: cut(volume) for key, volume in volumes.items()},
        labels={key: cut(volume) for key, volume in labels.items()},
        position=(flat[0] + columns[None, :], flat[1] + rows[:, None]),
        determinant=cut(volumes["determinant"]) if "determinant" in volumes else _determinant(field, plane, centre).T,
        millimetres=(float(millimetres[shown[0]]), float(millimetres[shown[1]])),
        name=name,
        sides=sides,
    )


def _determinant(field: Array, plane: int | None, centre: Sequence[int]) -> Array:
    """The Jacobian determinant in a slice, from the slab that central differences reach."""
    if plane is None:
        return jacobian_determinant(torch.from_numpy(field)[None])[0].numpy()
    start, stop = max(centre[plane] - 1, 0), min(centre[plane] + 2, field.shape[1 + plane])
    slab = np.take(field, range(start, stop), axis=1 + plane)
    determinant = jacobian_determinant(torch.from_numpy(slab)[None])[0].numpy()
    return np.take(determinant, centre[plane] - start, axis=plane)


def _draw(slices: Sequence[_Slice], title: str | None, unit: str) -> Figure:
    scales = _scales(slices)
    titles = {**_TITLES, **{name: text for name, (text, _) in _MAPS.items() if name in slices[0].images}}
    figure, boxes = _layout([s.ratio for s in slices], title is not None, len(titles))
    shown: dict[str, Any] = {}
    for row, part in enumerate(slices):
        for column, name in enumerate(titles):
            axis = figure.add_axes(boxes[row][column], label=f"{name}_{row}")
            shown[name] = _panel(axis, name, part, scales[name])
            if row == 0:
                axis.set_title(titles[name], color="white", fontsize=10, pad=5)
            if column == 0:
                axis.set_ylabel(part.name, color="0.8", fontsize=9)
                _letter(axis, part.sides)
    _legends(figure, boxes[-1], shown, slices[0].labels, unit)
    if title:
        figure.suptitle(title, color="white", fontsize=11, y=1 - 0.08 / figure.get_figheight(), va="top")
    return figure


def _layout(
    ratios: Sequence[float], titled: bool, columns: int
) -> tuple[Figure, list[list[tuple[float, float, float, float]]]]:
    """Boxes for the panels: columns of one width, rows as high as their slices are, room for titles and scales."""
    heights = [_WIDTH * ratio for ratio in ratios]
    top = _HEAD + (_TITLE if titled else 0.0)
    width = _LEFT + columns * (_WIDTH + _GAP)
    height = top + sum(heights) + len(heights) * _GAP + _FOOT
    figure = Figure(figsize=(width, height), facecolor="black")
    boxes = []
    lower = height - top
    for tall in heights:
        lower -= tall
        lefts = [_LEFT + k * (_WIDTH + _GAP) for k in range(columns)]
        boxes.append([(left / width, lower / height, _WIDTH / width, tall / height) for left in lefts])
        lower -= _GAP
    return figure, boxes


def _scales(slices: Sequence[_Slice]) -> dict[str, tuple[float, float]]:
    """The ends of each panel's scale, the same in all rows."""

    def window(name: str) -> tuple[float, float]:
        values = np.concatenate([s.images[name].ravel() for s in slices]).astype(float)
        low, high = (float(v) for v in np.nanpercentile(values, [0.5, 99.8]))
        return (low, high) if high > low else (low, low + 1.0)

    moving, fixed = window("moving"), window("fixed")
    differences = [np.concatenate([s.difference(name).ravel() for s in slices]) for name in ("moving", "moved")]
    top = max(float(np.nanpercentile(d, 99.5)) for d in differences)
    difference = (0.0, top if top > 0 else 1.0)
    determinants = np.concatenate([s.determinant.ravel() for s in slices])
    logarithms = np.abs(np.log(determinants[determinants > 0]))
    limit = max(float(np.percentile(logarithms, 99.5)) if logarithms.size else 0.0, 0.1)
    spread = [s.images["uncertainty"].ravel() for s in slices if "uncertainty" in s.images]
    widest = float(np.nanpercentile(np.concatenate(spread), 99.5)) if spread else 0.0
    return {
        "moving": moving,
        "fixed": fixed,
        "moved": moving,
        "before": difference,
        "after": difference,
        "grid": moving,
        "jacobian": (-limit, limit),
        # One scale for all pictures, so that maps of several pairs and epochs can be compared.
        "weight": (0.0, 1.0),
        "uncertainty": (0.0, widest if widest > 0 else 1.0),
    }


def _panel(axis: Axes, name: str, part: _Slice, scale: tuple[float, float]) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if name == "jacobian":
        shown = _draw_jacobian(axis, part, scale)
    elif name in ("before", "after"):
        shown = _show(axis, part.difference("moving" if name == "before" else "moved"), scale, "magma")
    elif name in _MAPS:
        shown = _show(axis, part.images[name], scale, _MAPS[name][1])
    else:
        shown = _show(axis, part.images["moved" if name == "grid" else name], scale, "gray")
        if name == "grid":
            _draw_grid(axis, part)
        elif name in part.labels:
            _draw_labels(axis, part, name)
    rows, columns = part.determinant.shape
    across = (-0.5, columns - 0.5)
    axis.set_xlim(across if part.sides is None else across[::-1])
    axis.set_ylim(-0.5, rows - 0.5)
    return shown


def _show(axis: Axes, image: Array, scale: tuple[float, float], colours: Any) -> Any:
    # The panel's box has the shape of the slice in mm already.
    options: dict[str, Any] = {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    return axis.imshow(image, cmap=colours, vmin=scale[0], vmax=scale[1], **options)


def _draw_labels(axis: Axes, part: _Slice, name: str) -> None:
    if name == "moved" and "fixed" in part.labels:
        _outline(axis, part.labels["fixed"], "dashed", 0.9)
    _outline(axis, part.labels[name], "solid", 1.1)


def _outline(axis: Axes, labels: Array, style: str, width: float) -> None:
    for label in np.unique(labels[labels > 0]):
        colour = LABEL_COLOURS[(int(label) - 1) % len(LABEL_COLOURS)]
        # One voxel more around, so that outlines close at the edge of the image.
        mask = np.pad(labels == label, 1).astype(float)
        rows, columns = (np.arange(n) - 1 for n in mask.shape)
        axis.contour(columns, rows, mask, [0.5], colors=[colour], linewidths=width, linestyles=style)


def _draw_grid(axis: Axes, part: _Slice) -> None:
    rows, columns = part.determinant.shape
    if min(rows, columns) < 2:
        return
    extents = [n * mm for n, mm in zip((columns, rows), part.millimetres, strict=True)]
    for position, size, mm in zip(part.position, (columns, rows), part.millimetres, strict=True):
        step = max(2.0, max(extents) / 24 / mm)
        levels = np.arange(step / 2, size, step)
        axis.contour(position, levels, colors=[GRID_COLOUR], linewidths=0.7)


def _draw_jacobian(axis: Axes, part: _Slice, scale: tuple[float, float]) -> Any:
    folded = part.determinant <= 0
    shown = _show(axis, np.log(np.where(folded, 1.0, part.determinant)), scale, JACOBIAN_COLOURS)
    if folded.any():
        marks = np.ma.masked_where(~folded, np.ones(folded.shape))
        _show(axis, marks, (0.0, 1.0), ListedColormap([FOLD_COLOUR]))
    return shown


def _letter(axis: Axes, sides: Sequence[str] | None) -> None:
    """Say what lies where at the edges of a panel."""
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.02, "center", "bottom"))
    for text, (x, y, ha, va) in zip(sides or (), (*places, (0.5, 0.98, "center", "top")), strict=False):
        axis.text(x, y, text, ha=ha, va=va, color="#ffd92f", fontsize=8, transform=axis.transAxes)


def _legends(
    figure: Figure, boxes: Sequence[Sequence[float]], shown: Mapping[str, Any], labels: Any, unit: str
) -> None:
    """Scales beneath the differences, the determinant and maps, and what the outlines are."""
    high = figure.get_figheight()
    names = list(shown)
    scales = [
        ("before", "after", "absolute difference"),
        ("jacobian", "jacobian", "> 0: moving shrinks    red: folded"),
        ("weight", "weight", "weight of the smoothness"),
        ("uncertainty", "uncertainty", f"standard deviation, {unit}"),
    ]
    for first, last, text in (scale for scale in scales if scale[0] in shown):
        left, lower = boxes[names.index(first)][:2]
        right = boxes[names.index(last)][0] + boxes[names.index(last)][2]
        margin = 0.06 * (right - left)
        box = (left + margin, lower - 0.18 / high, right - left - 2 * margin, 0.09 / high)
        bar = figure.colorbar(shown[last], cax=figure.add_axes(box, label=f"{last}_scale"), orientation="horizontal")
        bar.set_label(text, color="0.8", fontsize=8, labelpad=1)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(colors="0.8", labelsize=7, length=2, pad=1)
    if "moved" in labels and "fixed" in labels:
        left, lower, width = boxes[names.index("moved")][:3]
        lines = [
            Line2D([], [], color="0.8", linestyle="-", label="moved"),
            Line2D([], [], color="0.8", linestyle="--", label="fixed"),
        ]
        place = (left + width / 2, lower - 0.05 / high)
        figure.legend(
            handles=lines,
            loc="upper center",
            bbox_to_anchor=place,
            ncols=2,
            fontsize=8,
            frameon=False,
            labelcolor="0.8",
        )
