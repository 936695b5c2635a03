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
"""The views that a reader of a report can choose from, and what is said about each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np

from common.handlers.report.sheets import Scales, colour_bar
from common.handlers.report.volumes import Volumes
from common.handlers.views import LABEL_COLOURS

__all__ = ["Choice", "Pane", "choices", "explanations"]

_CIRCLE = {"name": "fixed", "colour": "#4cc9f0", "shape": "circle"}
_MAX_LABELS = 40


@dataclass(frozen=True)
class Pane:
    """One picture of a view.

    Attributes:
        title: beneath it.
        how: ``sheet`` shows the one image as it is; other names are the ways in which the script mixes two.
        images: names of contact sheets, moving before fixed.
        over: names of contact sheets that are laid over it.
        marks: landmarks that are drawn: name, colour and shape.
    """

    title: str
    how: str
    images: tuple[str, ...]
    over: tuple[str, ...] = ()
    marks: tuple[dict[str, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """One view."""

    title: str
    panes: list[Pane] = field(default_factory=list)


def choices(volumes: Volumes) -> dict[str, Choice]:
    """The views that there is something for, by key."""
    views = {
        "side": Choice(
            "Side by side", [_plain("moving, before", "before"), _plain("fixed", "fixed"), _plain("moved", "moved")]
        ),
        "swipe": Choice("Swipe", _pairs("swipe")),
        "checkerboard": Choice("Checkerboard", _pairs("checkerboard")),
        "colours": Choice("Colours", _pairs("colours")),
        "difference": Choice("Difference", _pairs("difference")),
    }
    if volumes.labels or volumes.points:
        views["outlines"] = Choice(_outline_title(volumes), _outlined(volumes))
    views["deformation"] = Choice(
        "Deformation",
        [Pane("warped grid on the moved image", "sheet", ("moved",), ("grid",)), _plain("log Jacobian", "jacobian")],
    )
    if volumes.maps:
        views["maps"] = Choice("Maps", [_plain(title, f"map_{k}") for k, title in enumerate(volumes.maps)])
    return views


def explanations(volumes: Volumes, scale: Scales) -> dict[str, str]:
    """HTML beneath the choice, by key: what colours mean, and what can be set."""
    limit = scale.log_determinant
    share = 100 * scale.difference / 255
    texts = {
        "side": "<span>The moving scan before registration, the fixed scan, and the moved scan.</span>",
        "swipe": '<label for="share">Fixed on the left, moving on the right <input type="range" id="share" min="0"'
        ' max="100" value="50" step="1"></label><label><input type="checkbox" id="blink"> blink instead</label>',
        "checkerboard": "<span>Fields of the fixed and of the moving scan in turn, the fixed one at the top left. Edges"
        " that run on across fields are aligned.</span>",
        "colours": f"<span>{_swatch('fixed')}fixed alone</span><span>{_swatch('moving')}moving alone</span>"
        "<span>grey where both are alike</span>",
        "difference": f"<span>Absolute difference of grey values</span>{_scale('difference', '0', f'{share:.0f} %')}",
        "deformation": "<span>Lines are a regular grid that lay on the moving scan.</span>"
        f"{_scale('jacobian', f'{-limit:.2g}, moving grows', f'{limit:.2g}, moving shrinks')}"
        f"<span>{_swatch('fold')}folded</span>",
        "maps": "".join(
            f"<span>{escape(title)}</span>{_scale('map', f'{low:.3g}', f'{high:.3g}')}"
            for title, (low, high) in scale.maps.items()
        ),
        "outlines": _legend(volumes),
    }
    return texts


def _plain(title: str, name: str) -> Pane:
    return Pane(title, "sheet", (name,))


def _pairs(how: str) -> list[Pane]:
    return [Pane("before", how, ("before", "fixed")), Pane("after", how, ("moved", "fixed"))]


def _outlined(volumes: Volumes) -> list[Pane]:
    panes = []
    for name, title in (("before", "moving, before"), ("fixed", "fixed"), ("moved", "moved")):
        over = [f"outline_{k}" for k in dict.fromkeys((name, "fixed")) if k in volumes.labels]
        marks = [{"name": name, "colour": "#f78fb3", "shape": "cross"}] if name != "fixed" else []
        panes.append(Pane(title, "sheet", (name,), tuple(over), (*marks, _CIRCLE)))
    return panes


def _outline_title(volumes: Volumes) -> str:
    return " and ".join(
        text for text, given in (("outlines", volumes.labels), ("landmarks", volumes.points)) if given
    ).capitalize()


def _legend(volumes: Volumes) -> str:
    parts = []
    if volumes.labels:
        if "fixed" in volumes.labels and "moved" in volumes.labels:
            parts.append("<span>Labels: dashed fixed, solid moving.</span>")
        values = sorted({int(v) for label in volumes.labels.values() for v in np.unique(label) if v > 0})
        for value in values[:_MAX_LABELS]:
            parts.append(f"<span>{_swatch(str((value - 1) % len(LABEL_COLOURS)))}{value}</span>")
        if len(values) > _MAX_LABELS:
            parts.append(f"<span>and {len(values) - _MAX_LABELS} more</span>")
    if volumes.points:
        parts.append("<span>Landmarks: circles fixed, crosses moving.</span>")
    return "".join(parts)


def _swatch(kind: str) -> str:
    return f'<span class="swatch swatch-{kind}" aria-hidden="true"></span>'


def _scale(kind: str, low: str, high: str) -> str:
    alt = f"colours from {escape(low)} to {escape(high)}"
    return f'<span class="scale">{escape(low)}<img src="{colour_bar(kind)}" alt="{alt}">{escape(high)}</span>'
