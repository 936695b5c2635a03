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
"""One HTML page from what a registration was, did and gave."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from common.handlers.report import tables
from common.handlers.report.choices import choices, explanations
from common.handlers.report.inputs import ReportInputs
from common.handlers.report.planes import Plane, planes
from common.handlers.report.script import SCRIPT
from common.handlers.report.sheets import Scales, Sheet, scales, sheets, zoom
from common.handlers.report.style import STYLE
from common.handlers.report.volumes import Volumes, turned_volumes
from common.io.files import writing

__all__ = ["write_report"]

_CELLS = 8


def write_report(path: str | Path, inputs: ReportInputs) -> Path:
    """Write one page about one registered pair, which holds all it needs and asks the network for nothing.

    It shows slices of 3-D pairs in three planes as radiologists see them, the patient's right on the left, at most 48
    a plane and 256 pixels a side, within the box of what is not dark; 2-D pairs as their arrays are, the first axis to
    the right and the second up. The Jacobian is that of the whole transform, affine part included, in mm.

    Args:
        path: of the page, which ends in ``.html``; its folder is made.
        inputs: what it is about.

    Returns:
        the path.

    Raises:
        ValueError: for another extension.
        OSError: when the folder cannot be written to.
    """
    path = Path(path)
    volumes = turned_volumes(inputs)
    parts = planes(volumes)
    scale = scales(parts)
    drawn = [sheets(part, scale) for part in parts]
    with writing(path, [".html"]) as unfinished:
        unfinished.write_text(_page(inputs, volumes, parts, drawn, scale), encoding="utf-8")
    return path


def _page(
    inputs: ReportInputs, volumes: Volumes, parts: Sequence[Plane], drawn: Sequence[dict[str, Sheet]], scale: Scales
) -> str:
    names = f"{escape(inputs.moving.path.name)} registered to {escape(inputs.fixed.path.name)}"
    body = [
        f'<header><h1>{escape(inputs.title)}</h1><p class="name">{names}</p></header><main>',
        _warnings(inputs.warnings),
        "<noscript><p class='note'>Choosing a slice and a view needs JavaScript. Without it, all pictures are at the"
        " end of each plane.</p></noscript>",
        _pictures(volumes, parts, drawn, scale, inputs.aligned),
        _numbers(inputs, volumes),
        _provenance(inputs),
        "</main>",
        f'<script type="application/json" id="data">{_data(volumes, parts, drawn, scale)}</script>',
        f"<script>{SCRIPT}</script>",
    ]
    # The browser itself refuses whatever is not listed here: other files, other scripts, other styles.
    policy = f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}"
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(inputs.title)}: {names}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(body)}</body></html>\n"


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    lines = "".join(f'<li class="name">{escape(text)}</li>' for text in warnings)
    return f'<section class="note" aria-label="Warnings"><strong>Warnings</strong><ul>{lines}</ul></section>'


def _pictures(
    volumes: Volumes, parts: Sequence[Plane], drawn: Sequence[dict[str, Sheet]], scale: Scales, aligned: bool
) -> str:
    views = choices(volumes)
    radios = "".join(
        f'<label class="choice"><input type="radio" name="view" value="{key}"{" checked" if k == 0 else ""}>'
        f"<span>{escape(view.title)}</span></label>"
        for k, (key, view) in enumerate(views.items())
    )
    shown = explanations(volumes, scale)
    texts = "".join(f'<div data-view="{key}"{" hidden" if k else ""}>{shown[key]}</div>' for k, key in enumerate(views))
    width = max(len(view.panes) for view in views.values())
    sections = "".join(_section(k, part, drawn[k], width) for k, part in enumerate(parts))
    how = (
        "Seen as radiologists do: the patient’s right is on the left."
        if len(volumes.shape) == 3
        else "Shown as the array is: its first axis runs right, its second up."
    )
    if aligned:
        how += " Before is where the affine map has brought the moving scan."
    return (
        f'<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2><p class="soft">{how} Grey values are'
        " scaled from percentile 0.5 to 99.8, of the fixed image and of the moving image before and after.</p>"
        f'<div class="toolbar" hidden><fieldset><legend>View</legend>{radios}</fieldset>'
        f'<div class="explain">{texts}</div></div>{sections}</section>'
    )


def _section(number: int, part: Plane, drawn: dict[str, Sheet], width: int) -> str:
    key = f"plane-{number}"
    letters = "".join(
        f'<span class="side side-{k}" aria-hidden="true">{side}</span>' for k, side in enumerate(part.sides)
    )
    pane = (
        f'<figure class="pane"><div class="frame"><canvas role="img" aria-label="{part.name}"></canvas>{letters}</div>'
        "<figcaption></figcaption></figure>"
    )
    slider = (
        f'<div class="slider" hidden><label for="{key}-slice">Slice</label><input type="range" id="{key}-slice"'
        f' min="1" max="{len(part.captions)}" value="{part.start + 1}" step="1">'
        f'<output for="{key}-slice"></output></div>'
    )
    images = "".join(
        f'<img class="sheet" id="{key}-{name}" src="{sheet.source}" alt="{escape(sheet.alt)}">'
        for name, sheet in drawn.items()
    )
    return (
        f'<section class="plane" id="{key}" aria-labelledby="{key}-name"><h3 id="{key}-name">{part.name.capitalize()}'
        f'</h3><div class="panes" hidden>{pane * width}</div>{slider if len(part.captions) > 1 else ""}'
        f"<details><summary>All pictures</summary>{images}</details></section>"
    )


def _numbers(inputs: ReportInputs, volumes: Volumes) -> str:
    folded = int((volumes.determinant <= 0).sum())
    positive = volumes.determinant[volumes.determinant > 0]
    logarithm = np.log(positive) if positive.size else np.zeros(1)
    found = {
        "folded voxels": f"{folded} of {volumes.determinant.size}",
        "logarithm of the Jacobian determinant": f"{logarithm.min():.3g} to {logarithm.max():.3g}",
    }
    text = '<section aria-labelledby="measures"><h2 id="measures">Measures</h2>'
    if inputs.measures:
        text += tables.measures(inputs.measures) + tables.details_of_labels(inputs.measures, inputs.label_names)
    return f"{text}<p></p>{tables.facts(found, ('of the whole transform', 'value'))}</section>"


def _provenance(inputs: ReportInputs) -> str:
    parts = [("files", "Files", tables.grids(inputs))]
    if inputs.steps:
        parts.append(("steps", "What was done", tables.facts(inputs.steps, ("step", "how"))))
    if inputs.timings:
        parts.append(("timings", "Time", tables.timings(inputs.timings)))
    if inputs.command:
        parts.append(("command", "Command", f"<pre>{escape(inputs.command)}</pre>"))
    parts.append(("versions", "Versions", tables.facts(inputs.versions, ("program", "version"))))
    return "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{title}</h2>{text}</section>' for key, title, text in parts
    )


def _data(volumes: Volumes, parts: Sequence[Plane], drawn: Sequence[dict[str, Sheet]], scale: Scales) -> str:
    magma = np.rint(255 * np.asarray(colormaps["magma"](np.linspace(0, 1, 256)))[:, :3]).astype(int)
    content = {
        "planes": [_plane_data(k, part, drawn[k]) for k, part in enumerate(parts)],
        "views": {key: [pane.as_dict() for pane in view.panes] for key, view in choices(volumes).items()},
        "difference": scale.difference,
        "cells": _CELLS,
        "colours": magma.tolist(),
    }
    # Within a script element nothing but "<" could end it.
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _plane_data(number: int, part: Plane, drawn: dict[str, Sheet]) -> dict[str, Any]:
    rows, columns = part.size
    places = {
        name: {
            "id": f"plane-{number}-{name}",
            "columns": sheet.columns,
            "width": sheet.width,
            "height": sheet.height,
            "coarse": sheet.width < columns,
        }
        for name, sheet in drawn.items()
    }
    return {
        "key": f"plane-{number}",
        "name": part.name,
        "width": columns,
        "height": rows,
        "zoom": zoom(part),
        "millimetres": part.millimetres,
        "captions": part.captions,
        "sheets": places,
        "points": {name: np.round(points, 2).tolist() for name, points in part.points.items()},
    }


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
