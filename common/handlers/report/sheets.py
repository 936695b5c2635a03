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
"""The pictures of a report: one contact sheet with all slices of a plane for each thing that is drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap, to_rgb
from numpy.typing import NDArray
from PIL import Image

from common.handlers.report.planes import MAX_PIXELS, Plane
from common.handlers.views import FOLD_COLOUR, GRID_COLOUR, JACOBIAN_COLOURS, LABEL_COLOURS

__all__ = ["Scales", "Sheet", "colour_bar", "outlines", "scales", "sheets"]

Array = NDArray[Any]

# A grey sheet that is larger without loss is sent with a loss that the eye does not see.
_LOSSLESS_BYTES = 120_000
_QUALITIES = (88, 75, 60, 40)
_MAX_BYTES = 450_000
_SHADES = 63
_ALPHAS = 4
_LINES = 24


@dataclass(frozen=True)
class Sheet:
    """All slices of one plane in one picture, row by row.

    Attributes:
        source: data URI.
        columns: slices in a row.
        width, height: of a slice in this picture.
        alt: what it shows.
    """

    source: str
    columns: int
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Scales:
    """What the ends of the colours stand for.

    Attributes:
        difference: absolute difference of grey values (0 to 255) that is brightest.
        log_determinant: the scale goes from minus this to this.
        maps: lowest and highest value by title.
        line_step: distance of the lines of the warped grid, mm.
    """

    difference: float
    log_determinant: float
    maps: dict[str, tuple[float, float]]
    line_step: float


def scales(parts: Sequence[Plane]) -> Scales:
    """One scale for all planes."""

    def percentile(values: list[Array]) -> float:
        found = np.concatenate([v.ravel() for v in values])
        return float(np.nanpercentile(found, 99.5)) if np.isfinite(found).any() else 0.0

    pairs = [(part.images[name], part.images["fixed"]) for part in parts for name in ("before", "moved")]
    difference = percentile([np.abs(a.astype(np.int16) - b) for a, b in pairs])
    maps = {}
    for title in parts[0].maps:
        stacks = [part.maps[title] for part in parts]
        low, high = min(0.0, -percentile([-stack for stack in stacks])), percentile(stacks)
        maps[title] = (low, high if high > low else low + 1.0)
    return Scales(
        difference=difference if difference > 0 else 255.0,
        log_determinant=max(percentile([np.abs(part.log_determinant) for part in parts]), 0.1),
        maps=maps,
        line_step=max(max(part.millimetres) for part in parts) / _LINES,
    )


def sheets(part: Plane, scale: Scales) -> dict[str, Sheet]:
    """What is drawn of a plane, by name.

    ``fixed``, ``before`` and ``moved``, ``grid``, ``jacobian``, ``outline_<image>`` and, in their order, ``map_<k>``.
    Outlines and the grid are transparent between their lines, and finer than the images where these are small.
    """
    count = "image" if part.name == "image" else f"{len(part.captions)} {part.name} slices"
    titles = {"fixed": "the fixed image", "before": "the moving image before registration", "moved": "the moved image"}
    drawn = {name: _grey(part.images[name], f"{count}: {text}") for name, text in titles.items()}
    drawn["grid"] = _lines(part, scale, f"{count}: the regular grid of the moving image, warped")
    drawn["jacobian"] = _jacobian(part, scale, f"{count}: logarithm of the Jacobian determinant, folded voxels red")
    for number, (title, stack) in enumerate(part.maps.items()):
        drawn[f"map_{number}"] = _shaded(stack, scale.maps[title], _colours(colormaps["viridis"]), f"{count}: {title}")
    for name, labels in part.labels.items():
        fine = np.kron(labels, np.ones((1, zoom(part), zoom(part)), dtype=labels.dtype))
        lines = outlines(fine, dashed=name == "fixed" and "moved" in part.labels)
        colours = [(0, 0, 0), *(_rgb(colour) for colour in LABEL_COLOURS)]
        alphas = [0] + [255] * len(LABEL_COLOURS)
        drawn[f"outline_{name}"] = _palette(
            lines, colours, f"{count}: outlines of the labels of {titles[name]}", alphas
        )
    return drawn


def zoom(part: Plane) -> int:
    """How much finer than the image lines are drawn."""
    return min(max(MAX_PIXELS // max(part.size), 1), 8)


def outlines(labels: Array, dashed: bool = False) -> Array:
    """The pixels of labels that have another value above, below, left or right of them, or the edge of the image.

    Args:
        labels: (slices, rows, columns).
        dashed: leave out every other four pixels.

    Returns:
        uint8, 0 between the lines and else 1 + the number of the colour.
    """
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    inside = np.ones(labels.shape, dtype=bool)
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        inside &= padded[:, down : down + labels.shape[1], right : right + labels.shape[2]] == labels
    edge = (labels > 0) & ~inside
    if dashed:
        rows, columns = np.ogrid[: labels.shape[1], : labels.shape[2]]
        edge &= ((rows + columns) // 4 % 2 == 0)[None]
    colours = 1 + (labels.astype(np.int64) - 1) % len(LABEL_COLOURS)
    return np.where(edge, colours, 0).astype(np.uint8)


def colour_bar(kind: str) -> str:
    """A data URI of the colours of ``difference``, ``jacobian`` or ``map`` from low to high."""
    bars = {"difference": colormaps["magma"], "jacobian": JACOBIAN_COLOURS, "map": colormaps["viridis"]}
    pixels = np.rint(255 * np.asarray(bars[kind](np.linspace(0, 1, 256)))[None, :, :3]).astype(np.uint8)
    return _uri(Image.fromarray(pixels), "PNG")


def _lines(part: Plane, scale: Scales, alt: str) -> Sheet:
    """Where a coordinate of the source is a multiple of the step, and a half: a line one pixel wide, smooth."""
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(part.source).float(), scale_factor=zoom(part), mode="bilinear", align_corners=False
    ).numpy()
    alpha = np.zeros(fine.shape[1:], dtype=np.float32)
    for positions, pixels, size in zip(fine, part.size[::-1], part.millimetres, strict=True):
        step = max(2.0, scale.line_step * pixels / size)
        slopes = [np.square(np.gradient(positions, axis=k)) for k in (1, 2) if positions.shape[k] > 1]
        slope = np.sqrt(np.sum(slopes, axis=0))
        distance = np.abs((positions / step) % 1.0 - 0.5) * step / np.maximum(slope, 1e-6)
        line = np.clip(1.2 - distance, 0, 1)
        alpha = np.maximum(alpha, np.where((positions > -0.5) & (positions < pixels - 0.5), line, 0))
    shades = np.rint(alpha * _ALPHAS).astype(np.uint8)
    opacity = [round(255 * k / _ALPHAS) for k in range(_ALPHAS + 1)]
    return _palette(shades, [_rgb(GRID_COLOUR)] * (_ALPHAS + 1), alt, opacity)


def _jacobian(part: Plane, scale: Scales, alt: str) -> Sheet:
    ends = (-scale.log_determinant, scale.log_determinant)
    return _shaded(part.log_determinant, ends, [*_colours(JACOBIAN_COLOURS), _rgb(FOLD_COLOUR)], alt, part.folded)


def _shaded(
    stack: Array,
    ends: tuple[float, float],
    colours: Sequence[tuple[int, int, int]],
    alt: str,
    marked: Array | None = None,
) -> Sheet:
    """63 shades, and the colour after them where ``marked``; what is no number has the lowest.

    Coarser where it would be large: noise does not compress.
    """
    while True:
        share = np.nan_to_num((stack - ends[0]) / (ends[1] - ends[0]), nan=0.0)
        shades = np.rint(np.clip(share, 0, 1) * (_SHADES - 1)).astype(np.uint8)
        if marked is not None:
            shades[marked] = _SHADES
        sheet = _palette(shades, colours, alt)
        if len(sheet.source) < _MAX_BYTES or min(stack.shape[1:]) < 2:
            return sheet
        stack = _pairs(stack).mean((2, 4))
        marked = None if marked is None else np.asarray(_pairs(marked).any((2, 4)))


def _pairs(stack: Array) -> Array:
    """(slices, rows / 2, 2, columns / 2, 2); an odd last row or column is repeated."""
    _, rows, columns = stack.shape
    even = np.pad(stack, ((0, 0), (0, rows % 2), (0, columns % 2)), mode="edge")
    return even.reshape(len(stack), (rows + 1) // 2, 2, (columns + 1) // 2, 2)


def _colours(colours: Colormap) -> list[tuple[int, int, int]]:
    return [_rgb(colours(k / (_SHADES - 1))[:3]) for k in range(_SHADES)]


def _rgb(colour: Any) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in to_rgb(colour))
    return red, green, blue


def _grey(stack: Array, alt: str) -> Sheet:
    tiled, columns = _tile(stack)
    picture = Image.fromarray(tiled)
    uri = _uri(picture, "PNG")
    if len(uri) > _LOSSLESS_BYTES:
        for quality in _QUALITIES:
            uri = _uri(picture, "WEBP", quality=quality, method=2)
            if len(uri) < _MAX_BYTES:
                break
    return Sheet(uri, columns, stack.shape[2], stack.shape[1], alt)


def _palette(
    shades: Array, colours: Sequence[tuple[int, int, int]], alt: str, alphas: Sequence[int] | None = None
) -> Sheet:
    tiled, columns = _tile(shades)
    picture = Image.fromarray(tiled).convert("P")
    picture.putpalette([value for colour in colours for value in colour])
    options = {} if alphas is None else {"transparency": bytes(alphas)}
    return Sheet(_uri(picture, "PNG", **options), columns, shades.shape[2], shades.shape[1], alt)


def _tile(stack: Array) -> tuple[Array, int]:
    """Slices side by side, in about as many rows as columns."""
    count, rows, columns = stack.shape
    wide = min(count, max(1, round(np.sqrt(count * rows / columns))))
    high = -(-count // wide)
    padded = np.concatenate([stack, np.zeros((wide * high - count, rows, columns), dtype=stack.dtype)])
    tiled = padded.reshape(high, wide, rows, columns).swapaxes(1, 2).reshape(high * rows, wide * columns)
    return np.ascontiguousarray(tiled), wide


def _uri(picture: Image.Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    # The usual level 6 of PNG takes three times as long and saves a hundredth.
    picture.save(stream, kind, **({"compress_level": 4} if kind == "PNG" else {}), **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
