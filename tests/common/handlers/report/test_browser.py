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
"""Reports in a real browser: what a reader does, and what is seen then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from common.handlers.report import ReportInputs, write_report
from common.handlers.report.planes import planes
from common.handlers.report.volumes import turned_volumes
from tests.browser import Browser
from tests.common.handlers.report.example import SHAPE, pair, scan
from tests.common.handlers.report.test_page import EVIL, full


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def pixels(browser: Browser, plane: int = 0, pane: int = 0) -> np.ndarray:
    """(rows, columns, 3) of one canvas, one pixel for each of the image."""
    script = f"""
      const canvas = document.querySelectorAll("#plane-{plane} canvas")[{pane}];
      const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return [canvas.height, canvas.width, Array.from(image.data)];
    """
    height, width, values = browser.run(script)
    fine = min(max(256 // max(SHAPE[:2]), 1), 8)
    return np.array(values).reshape(height, width, 4)[fine // 2 :: fine, fine // 2 :: fine, :3]


def shown(browser: Browser, plane: int = 0) -> list[str]:
    """What is written beneath the pictures that are shown."""
    captions = f"document.querySelectorAll('#plane-{plane} figure:not([hidden]) figcaption')"
    return browser.run(f"return [...{captions}].map(e => e.textContent)")


def choose(browser: Browser, view: str) -> None:
    browser.click(f"input[value={view}]")


def test_views_of_a_2d_pair(browser: Browser, tmp_path: Path) -> None:
    inputs = pair(2)
    browser.open(write_report(tmp_path / "report.html", inputs))
    (part,) = planes(turned_volumes(inputs))
    before, fixed = part.images["before"][0], part.images["fixed"][0]
    assert shown(browser) == ["moving, before", "fixed", "moved"]
    assert (pixels(browser, pane=0) == before[..., None]).all() and (pixels(browser, pane=1) == fixed[..., None]).all()

    choose(browser, "checkerboard")
    assert shown(browser) == ["before", "after"]
    # Eight fields along the longer side, as many as fit along the other; the fixed image at the top left.
    rows, columns = np.arange(11) + 0.5, np.arange(13) + 0.5
    odd = (np.floor(rows[:, None] * 7 / 11) + np.floor(columns[None] * 8 / 13)) % 2 == 1
    assert (pixels(browser) == np.where(odd, before, fixed)[..., None]).all()

    choose(browser, "colours")
    assert (pixels(browser) == np.stack([before, fixed, before], -1)).all()

    choose(browser, "difference")
    away = np.abs(before.astype(int) - fixed)
    # One scale for before and after, which are the same here.
    brightest = np.percentile([away, away], 99.5)
    shade = np.minimum(255, np.floor(255 * away / brightest + 0.5)).astype(int)
    magma = np.rint(255 * np.asarray(colormaps["magma"](np.linspace(0, 1, 256)))[:, :3])
    assert (pixels(browser) == magma[shade]).all()
    assert browser.messages() == []


def test_swiping_and_blinking(browser: Browser, tmp_path: Path) -> None:
    inputs = pair(2)
    browser.open(write_report(tmp_path / "report.html", inputs))
    (part,) = planes(turned_volumes(inputs))
    before, fixed = part.images["before"][0][..., None], part.images["fixed"][0][..., None]
    choose(browser, "swipe")
    assert (pixels(browser)[:, :6] == fixed[:, :6]).all() and (pixels(browser)[:, 7:] == before[:, 7:]).all()
    browser.press("#share", "home")
    assert (pixels(browser) == before).all()
    browser.press("#share", "end")
    assert (pixels(browser) == fixed).all()
    browser.press("#blink", "space")
    seen = set()
    script = """
      return new Promise(resolve => setTimeout(() => resolve(
        document.querySelector("#plane-0 figcaption").textContent), 400));
    """
    for _ in range(8):
        seen.add(browser.run(script))
    assert seen == {"before: moving", "before: fixed"}
    assert browser.messages() == []


def test_slices_of_a_3d_pair_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    inputs = full(3)
    browser.open(write_report(tmp_path / "report.html", inputs))
    axial = planes(turned_volumes(inputs))[0]
    text = "return document.querySelector('#plane-0 output').textContent"
    assert browser.run(text) == f"4 of 7: {axial.captions[3]}"
    browser.press("#plane-0-slice", "right")
    assert browser.run(text) == f"5 of 7: {axial.captions[4]}"
    assert (pixels(browser, pane=1) == axial.images["fixed"][4][..., None]).all()
    browser.press("#plane-0-slice", "right")
    assert (pixels(browser, pane=1) == axial.images["fixed"][5][..., None]).all()
    browser.press("#plane-0-slice", "home")
    assert (pixels(browser, pane=1) == axial.images["fixed"][0][..., None]).all()
    label = browser.run("return document.querySelector('#plane-0 canvas').getAttribute('aria-label')")
    assert label == f"axial, {axial.captions[0]}: moving, before"
    # Other planes stay where they are.
    assert browser.run("return document.querySelector('#plane-1 output').textContent").startswith("6 of 11")
    # Views follow the arrow keys, too.
    browser.press("input[value=side]", "right")
    assert browser.run("return document.querySelector('input[name=view]:checked').value") == "swipe"
    assert shown(browser, 2) == ["before", "after"]


def test_outlines_landmarks_deformation_and_maps(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_report(tmp_path / "report.html", full(3)))
    choose(browser, "outlines")
    coloured = "return [...document.querySelectorAll('#plane-0 canvas')].map(c => { const d = c.getContext('2d')"
    coloured += ".getImageData(0, 0, c.width, c.height).data; let n = 0; for (let k = 0; k < d.length; k += 4)"
    coloured += " n += d[k] !== d[k + 1] || d[k] !== d[k + 2]; return n; })"
    assert min(browser.run(coloured)) > 20
    choose(browser, "deformation")
    assert shown(browser) == ["warped grid on the moved image", "log Jacobian"]
    # The field is a scaling by 1.1: all of one colour, the brightest green.
    assert (pixels(browser, pane=1) == (0xA6, 0xF5, 0xC4)).all()
    visible = "return [...document.querySelectorAll('[data-view]:not([hidden])')].map(e => e.dataset.view)"
    assert browser.run(visible) == ["deformation"]
    choose(browser, "maps")
    assert shown(browser) == ["weight"] and (pixels(browser) == (0xFD, 0xE7, 0x25)).all()
    assert browser.messages() == []


def test_nothing_is_asked_of_the_network_and_names_run_nothing(browser: Browser, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random(SHAPE[:2])
    evil = scan(image, name=EVIL.replace("/", "∕"))
    inputs = ReportInputs(
        evil, evil, image, image, np.zeros((2, *SHAPE[:2])), maps={EVIL: image}, warnings=[EVIL], title=EVIL
    )
    browser.open(write_report(tmp_path / "report.html", inputs))
    choose(browser, "maps")
    assert shown(browser) == [EVIL]
    assert browser.run("return window.hacked === undefined")
    asked = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in asked)
    assert browser.messages() == []


@pytest.mark.parametrize("width", [360, 1300])
def test_nothing_sticks_out_of_the_window(browser: Browser, tmp_path: Path, width: int) -> None:
    browser.resize(width, 800)
    browser.open(write_report(tmp_path / "report.html", full(3)))
    for view in ("side", "swipe", "outlines", "deformation"):
        choose(browser, view)
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    tops = browser.run("return [...document.querySelectorAll('#plane-0 figure:not([hidden])')].map(e => e.offsetTop)")
    assert width < 1000 or len(set(tops)) == 1


def test_without_javascript_all_pictures_are_still_there(browser: Browser, tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", full(3))
    try:
        browser.command("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(path)
        browser.click("#plane-0 summary")
    finally:
        browser.command("Emulation.setScriptExecutionDisabled", value=False)
    parts = "document.querySelectorAll('#plane-0 img, .toolbar, .panes')"
    seen = browser.run(f"return [...{parts}].map(e => [e.tagName, e.offsetHeight > 0])")
    assert {tuple(pair) for pair in seen} == {("IMG", True), ("DIV", False)}
