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

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from common.spatial import jacobian_determinant

__all__ = ["registration_figure", "figure_to_array", "LABEL_COLOURS", "FOLD_COLOUR"]

Array = NDArray[Any]

# Distinct on grey and none of them the red of a fold.
LABEL_COLOURS = ("#ffd92f", "#4cc9f0", "#7bd389", "#f78fb3", "#b39ddb", "#ffb074", "#e8e8e8", "#00b4a0")
FOLD_COLOUR = "#ff0000"
_COLUMNS = ("moving", "fixed", "moved", "before", "after", "grid", "jacobian")
_TITLES = ("moving", "fixed", "moved", "|moving − fixed|", "|moved − fixed|", "moving's grid, warped", "log det J")


class _Volumes(NamedTuple):
    """Everything that is drawn, as numpy arrays on the fixed grid."""

    images: dict[str, Array]
    labels: dict[str, Array]
    position: Array
    determinant: Array


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
    spacing: Any = None,
) -> Figure:
    """Draw one registered pair.

    Rows are slices: the one image in 2-D, three orthogonal ones in 3-D, through the centre of the fixed labels or else
    of the image. Array axes run right and up, as for images in RAS orientation. Columns:

    - moving, fixed, moved. Label outlines where there are labels; on the moved image solid lines are the warped
      labels and dashed ones the fixed labels. Moving and moved share one grey scale, fixed has its own.
    - absolute difference to fixed before and after, on one scale.
    - the warped grid on the moved image. A regular grid painted onto the *moving* image is carried along by the
      warping: the lines are where a component of ``x + ddf(x)`` takes the values 0, s, 2s, ... They are not arrows or
      a grid pushed by ``ddf``, which would show the inverse. Displacement across the slice is not visible in it.
    - logarithm of the Jacobian determinant of ``x + ddf(x)``, positive where a fixed voxel draws from more than one
      voxel of moving, that is where moving tissue shrinks. Voxels with a determinant of 0 or less are red.

    Args:
        moving: (C, \\*S) or (\\*S) image, of which the first channel is drawn. When its size is not that of the fixed
            image it is cropped or extended to that, voxel by voxel as a field of 0 would.
        fixed: likewise.
        moved: the moving image warped by ``ddf``.
        ddf: (d, \\*S) field in voxels, d = 2 or 3.
        moving_label, fixed_label, moved_label: (1, \\*S) or (\\*S) label maps.
        title: a line above all.
        spacing: mm per axis, for the shape of the panels.

    Returns:
        a figure that no pyplot state knows of; :func:`figure_to_array` gives its pixels.

    Raises:
        ValueError: when the field has another form.
    """
    labels = {"moving": moving_label, "fixed": fixed_label, "moved": moved_label}
    volumes = _volumes({"moving": moving, "fixed": fixed, "moved": moved}, labels, ddf)
    dims = volumes.position.shape[0]
    aspect = np.ones(dims) * np.asarray(1.0 if spacing is None else spacing, dtype=float)
    planes = [None] if dims == 2 else [0, 1, 2]
    figure, axes = _layout(volumes.determinant.shape, aspect, planes, title is not None)
    scales = _scales(volumes)
    centre = _centre(volumes)
    mappables: dict[str, Any] = {}
    for row, plane in enumerate(planes):
        cut = _Cut(plane, centre, aspect)
        for column, name in enumerate(_COLUMNS):
            mappables[name] = _panel(axes[row][column], name, volumes, cut, scales)
        axes[row][0].set_ylabel(cut.name(dims), color="0.8", fontsize=9)
    for axis, text in zip(axes[0], _TITLES, strict=True):
        axis.set_title(text, color="white", fontsize=10)
    _furnish(figure, axes, mappables, title, "moved" in volumes.labels)
    return figure


def figure_to_array(figure: Figure, dpi: int = 110) -> NDArray[np.uint8]:
    """Render a figure without a display.

    Returns:
        (height, width, 3) pixels.
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


class _Cut:
    """A slice across axis ``plane`` of a volume (None: a 2-D image), shown with array axes to the right and up."""

    def __init__(self, plane: int | None, centre: Sequence[int], aspect: Array) -> None:
        self.plane, self.centre = plane, centre
        self.shown = [axis for axis in range(len(aspect)) if axis != plane]
        self.aspect = float(aspect[self.shown[1]] / aspect[self.shown[0]])

    def __call__(self, volume: Array) -> Array:
        """The slice with its second array axis first, as matplotlib wants rows."""
        flat = volume if self.plane is None else np.take(volume, self.centre[self.plane], axis=self.plane)
        return flat.T

    def name(self, dims: int) -> str:
        if self.plane is None:
            return ""
        return f"axis {self.plane} = {self.centre[self.plane]}"


def _plain(value: Tensor, dims: int, channels: bool = False) -> Array:
    """Bring (C, \\*S), (\\*S) or (1, C, \\*S) to (\\*S), or to (C, \\*S) with ``channels``."""
    tensor = torch.as_tensor(value).detach().cpu()
    tensor = tensor.as_tensor() if hasattr(tensor, "as_tensor") else tensor
    if tensor.ndim == dims + 2:
        tensor = tensor[0]
    if tensor.ndim == dims + 1 and not channels:
        tensor = tensor[0]
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


def _volumes(images: dict[str, Tensor], labels: dict[str, Tensor | None], ddf: Tensor) -> _Volumes:
    dims = ddf.shape[0] if ddf.ndim == ddf.shape[0] + 1 else ddf.shape[1]
    if dims not in (2, 3) or ddf.ndim not in (dims + 1, dims + 2):
        raise ValueError(f"ddf must be (d, *S) with d = 2 or 3 spatial axes, got {tuple(ddf.shape)}")
    field = _plain(ddf, dims, channels=True)
    shape = field.shape[1:]
    drawn = {name: _fit(_plain(image, dims), shape) for name, image in images.items()}
    outlined = {name: _fit(_plain(value, dims), shape) for name, value in labels.items() if value is not None}
    determinant = jacobian_determinant(torch.from_numpy(field).double()[None])[0].numpy()
    return _Volumes(drawn, outlined, field + np.indices(shape), determinant)


def _fit(volume: Array, shape: Sequence[int]) -> Array:
    """Crop or extend at the far end of each axis, the last voxel going on as border padding would have it."""
    cropped = volume[tuple(slice(0, n) for n in shape)]
    return np.pad(cropped, [(0, n - have) for n, have in zip(shape, cropped.shape, strict=True)], mode="edge")


def _centre(volumes: _Volumes) -> list[int]:
    label = volumes.labels.get("fixed")
    if label is not None and (label > 0).any():
        return [round(float(where.mean())) for where in np.nonzero(label > 0)]
    return [n // 2 for n in volumes.determinant.shape]


def _scales(volumes: _Volumes) -> dict[str, tuple[float, float]]:
    images = volumes.images
    scales = {name: _window(images[name]) for name in ("moving", "fixed")}
    scales["moved"] = scales["moving"]
    differences = [np.abs(images[name] - images["fixed"]) for name in ("moving", "moved")]
    top = max(float(np.percentile(d, 99.5)) for d in differences)
    scales["before"] = scales["after"] = (0.0, top if top > 0 else 1.0)
    positive = volumes.determinant[volumes.determinant > 0]
    limit = float(np.percentile(np.abs(np.log(positive)), 99.5)) if positive.size else 0.0
    scales["jacobian"] = (-max(limit, 0.1), max(limit, 0.1))
    return scales


def _window(image: Array) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(image, [0.5, 99.8]))
    return (low, high) if high > low else (low, low + 1.0)


def _layout(shape: Sequence[int], aspect: Array, planes: Sequence[int | None], titled: bool) -> tuple[Figure, Any]:
    """Rows as high as their slices are, for columns of one width."""
    size = np.asarray(shape) * aspect
    ratios = []
    for plane in planes:
        across, up = (size[axis] for axis in range(len(size)) if axis != plane)
        ratios.append(up / across)
    width = 2.1
    height = width * float(sum(ratios)) + 0.75 + (0.3 if titled else 0.0)
    figure = Figure(figsize=(width * len(_COLUMNS), height), facecolor="black", layout="constrained")
    axes = figure.subplots(len(planes), len(_COLUMNS), squeeze=False, gridspec_kw={"height_ratios": ratios})
    return figure, axes


def _panel(axis: Axes, name: str, volumes: _Volumes, cut: _Cut, scales: dict[str, tuple[float, float]]) -> Any:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if name == "jacobian":
        return _draw_jacobian(axis, volumes, cut, scales[name])
    if name in ("before", "after"):
        source = "moving" if name == "before" else "moved"
        difference = np.abs(volumes.images[source] - volumes.images["fixed"])
        return _show(axis, cut(difference), cut, scales[name], "magma")
    image = "moved" if name == "grid" else name
    shown = _show(axis, cut(volumes.images[image]), cut, scales[image], "gray")
    if name == "grid":
        _draw_grid(axis, volumes, cut)
    elif name in volumes.labels:
        _draw_outlines(axis, volumes, cut, name)
    return shown


def _show(axis: Axes, image: Array, cut: _Cut, scale: tuple[float, float], colours: str) -> Any:
    return axis.imshow(
        image,
        cmap=colours,
        vmin=scale[0],
        vmax=scale[1],
        origin="lower",
        aspect=cut.aspect,
        interpolation="nearest",
    )


def _draw_outlines(axis: Axes, volumes: _Volumes, cut: _Cut, name: str) -> None:
    present = sorted(int(v) for label in volumes.labels.values() for v in np.unique(label) if v > 0)
    order = {label: index for index, label in enumerate(dict.fromkeys(present))}
    _outline(axis, cut(volumes.labels[name]), order, "solid", 1.0)
    if name == "moved" and "fixed" in volumes.labels:
        _outline(axis, cut(volumes.labels["fixed"]), order, "dashed", 0.8)


def _outline(axis: Axes, labels: Array, order: dict[int, int], style: str, width: float) -> None:
    for label in np.unique(labels[labels > 0]):
        colour = LABEL_COLOURS[order[int(label)] % len(LABEL_COLOURS)]
        # One voxel around, so that outlines close at the edge of the image.
        mask = np.pad(labels == label, 1).astype(float)
        where = [np.arange(n) - 1 for n in mask.shape]
        axis.contour(where[1], where[0], mask, [0.5], colors=[colour], linewidths=width, linestyles=style)
    axis.set_xlim(-0.5, labels.shape[1] - 0.5)
    axis.set_ylim(-0.5, labels.shape[0] - 0.5)


def _draw_grid(axis: Axes, volumes: _Volumes, cut: _Cut) -> None:
    for array_axis in cut.shown:
        position = cut(volumes.position[array_axis])
        size = volumes.position.shape[1 + array_axis]
        step = max(3, round(size / 22))
        levels = np.arange(0, size, step)
        if min(position.shape) > 1:
            axis.contour(position, levels, colors=["#4cc9f0"], linewidths=0.6, alpha=0.9)


def _draw_jacobian(axis: Axes, volumes: _Volumes, cut: _Cut, scale: tuple[float, float]) -> Any:
    determinant = cut(volumes.determinant)
    folded = determinant <= 0
    logarithm = np.log(np.where(folded, 1.0, determinant))
    colours = colormaps["PRGn"]
    shown = axis.imshow(
        logarithm,
        cmap=colours,
        norm=TwoSlopeNorm(0.0, *scale),
        origin="lower",
        aspect=cut.aspect,
        interpolation="nearest",
    )
    if folded.any():
        marks = np.ma.masked_where(~folded, np.ones(folded.shape))
        red = ListedColormap([FOLD_COLOUR])
        axis.imshow(marks, cmap=red, origin="lower", aspect=cut.aspect, interpolation="nearest")
    return shown


def _furnish(figure: Figure, axes: Any, mappables: dict[str, Any], title: str | None, labelled: bool) -> None:
    for columns, name, text in (((3, 4), "after", "intensity"), ((6,), "jacobian", "> 0: moving shrinks; red: folded")):
        beneath = [axes[row][column] for row in range(len(axes)) for column in columns]
        bar = figure.colorbar(mappables[name], ax=beneath, location="bottom", fraction=0.04, pad=0.02, aspect=30)
        bar.set_label(text, color="0.8", fontsize=8)
        bar.ax.tick_params(colors="0.8", labelsize=7)
    if title:
        figure.suptitle(title, color="white", fontsize=11)
    if labelled:
        lines = [
            Line2D([], [], color="0.8", linestyle="-", label="moved"),
            Line2D([], [], color="0.8", linestyle="--", label="fixed"),
        ]
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0)}
        axes[-1][2].legend(handles=lines, ncols=2, fontsize=7, frameon=False, labelcolor="0.8", **place)
