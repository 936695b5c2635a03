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
from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from common.handlers.report import ReportInputs, write_report
from common.io import load_image
from common.spatial import warp
from tests.common.handlers.report.example import SHAPE, pair, scaling, scan

VOID = {"meta", "link", "img", "input", "br"}
EVIL = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">\'&'


class Page(HTMLParser):
    """Elements with their attributes, and the text of each; complains about what is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("script", "style"))

    def inside(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]


def page(folder: Path, inputs: ReportInputs) -> Page:
    return Page(write_report(folder / "report.html", inputs))


def full(dims: int) -> ReportInputs:
    """Everything that can be given."""
    label = np.zeros(SHAPE[:dims], dtype=int)
    label[2:6] = 3
    points = np.full((2, dims), 3.0)
    return pair(
        dims,
        ddf=scaling(dims, 1.1),
        fixed_label=label,
        before_label=label,
        moved_label=label,
        fixed_points=points,
        before_points=points,
        moved_points=points,
        maps={"weight": np.ones(SHAPE[:dims])},
        title="My pair",
        steps={"affine": "rigid"},
        command="python -m common register --moving 'a b.nii'",
        versions={"WarpZoo": "0.1.0"},
        timings={"network": 0.5},
        measures={"dice_before": [0.5], "dice": [0.75], "tre": [float("nan")]},
        warnings=["The scans hardly overlap."],
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_a_page_says_what_was_given(tmp_path: Path, dims: int) -> None:
    text = page(tmp_path, full(dims)).text()
    shape = " × ".join(str(n) for n in SHAPE[:dims])
    said = [
        "My pair",
        "moving.nii.gz registered to fixed.nii.gz",
        shape,
        "RAS"[:dims],
        "rigid",
        "'a b.nii'",
        "WarpZoo0.1.0",
    ]
    said += ["network0.5", "0.50.75+0.25", "not measured", "The scans hardly overlap.", f"0 of {np.prod(SHAPE[:dims])}"]
    said += ["radiologists"] if dims == 3 else ["its first axis runs right"]
    assert [part for part in said if part not in text] == []


def test_what_was_not_given_is_left_out(tmp_path: Path) -> None:
    found = page(tmp_path, pair(2))
    assert not {"Warnings", "What was done", "Time", "Command"} & set(found.inside("h2") + found.inside("strong"))
    assert {a["value"] for a in found.all("input") if a.get("name") == "view"} == {
        "side",
        "swipe",
        "checkerboard",
        "colours",
        "difference",
        "deformation",
    }
    assert "torch" + torch.__version__ in found.text()


@pytest.mark.parametrize("dims", [2, 3])
def test_the_page_holds_all_it_needs(tmp_path: Path, dims: int) -> None:
    found = page(tmp_path, full(dims))
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", found.source)
    addresses = [a[name] for _, a in found.elements for name in ("src", "href", "action", "data") if name in a]
    assert addresses and all(address is not None and address.startswith("data:") for address in addresses)
    assert not [name for _, a in found.elements for name in a if name.startswith("on") or name == "style"]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_browser_is_told_to_run_this_script_alone(tmp_path: Path, dims: int) -> None:
    found = page(tmp_path, full(dims))
    policy = next(a["content"] for a in found.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    (script,) = (t for t in found.inside("script") if "use strict" in t)
    (style,) = found.inside("style")
    for kind, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize(("dims", "planes"), [(2, ["image"]), (3, ["axial", "coronal", "sagittal"])])
def test_each_plane_has_a_sheet_for_each_thing_that_is_drawn(tmp_path: Path, dims: int, planes: list[str]) -> None:
    found = page(tmp_path, full(dims))
    sheets = [a for a in found.all("img") if a.get("class") == "sheet"]
    things = {
        "fixed",
        "before",
        "moved",
        "grid",
        "jacobian",
        "outline_fixed",
        "outline_before",
        "outline_moved",
        "map_0",
    }
    assert {a["id"] for a in sheets} == {f"plane-{k}-{thing}" for k in range(len(planes)) for thing in things}
    data = json.loads(next(t for t in found.inside("script") if t.startswith("{")))
    assert [plane["name"] for plane in data["planes"]] == planes
    # All that a view asks for is there.
    for panes in data["views"].values():
        for pane in panes:
            assert {*pane["images"], *pane["over"]} <= things
    assert data["planes"][0]["points"].keys() == {"fixed", "before", "moved"}


@pytest.mark.parametrize("dims", [2, 3])
def test_the_page_is_usable_without_a_mouse_and_without_seeing(tmp_path: Path, dims: int) -> None:
    found = page(tmp_path, full(dims))
    assert all(a.get("alt") for a in found.all("img"))
    assert all(a.get("aria-label") for a in found.all("canvas"))
    ids = Counter(a["id"] for _, a in found.elements if "id" in a)
    assert max(ids.values()) == 1
    # Inputs are named by a label around them or one that points to them.
    pointed = {a["for"] for a in found.all("label") if "for" in a}
    assert pointed <= ids.keys()
    sliders = [a for a in found.all("input") if a["type"] == "range"]
    assert len(sliders) == (1 if dims == 2 else 4) and all(a["id"] in pointed for a in sliders)
    assert {a["aria-labelledby"] for _, a in found.elements if "aria-labelledby" in a} <= ids.keys()
    html = found.all("html")
    assert html == [{"lang": "en"}]


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random(SHAPE[:2])
    evil = scan(image, name=EVIL.replace("/", "∕"))
    inputs = ReportInputs(
        evil,
        evil,
        image,
        image,
        np.zeros((2, *SHAPE[:2])),
        maps={EVIL: image},
        title=EVIL,
        steps={EVIL: EVIL},
        command=EVIL,
        versions={EVIL: EVIL},
        timings={EVIL: 1.0},
        measures={EVIL: [1.0, 2.0]},
        label_names=[EVIL, EVIL],
        warnings=[EVIL],
    )
    found = page(tmp_path, inputs)
    assert len(found.all("script")) == 2 and found.text().count("window.hacked") > 20
    assert not any("onerror" in a for _, a in found.elements)


def test_a_page_is_replaced_as_a_whole_and_has_its_own_extension(tmp_path: Path) -> None:
    first = write_report(tmp_path / "new/report.html", pair(2)).read_text(encoding="utf-8")
    assert write_report(tmp_path / "new/report.html", pair(2)).read_text(encoding="utf-8") == first
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match=r"\.html"):
        write_report(tmp_path / "report.txt", pair(2))


def test_a_brain_makes_a_page_of_a_few_megabytes_in_seconds(tmp_path: Path, shared: Path) -> None:
    moving, fixed = (load_image(shared / f"data/brain_pair/image_{k}_full_size.nii.gz") for k in "AB")
    coarse = 4 * torch.randn(1, 3, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    ddf = torch.nn.functional.interpolate(coarse, size=fixed.array.shape, mode="trilinear", align_corners=True)
    moved = warp(torch.from_numpy(moving.array.astype("float32"))[None, None], ddf)
    label = torch.from_numpy((fixed.array > 0.3).astype("int32"))
    start = time.process_time()
    path = write_report(
        tmp_path / "report.html",
        ReportInputs(moving, fixed, moving.array, moved, ddf, fixed_label=label, moved_label=label),
    )
    assert time.process_time() - start < 15  # About 5 s on a free core.
    assert 1e6 < path.stat().st_size < 6e6
