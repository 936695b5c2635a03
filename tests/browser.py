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
"""A real browser for tests: Chromium, spoken to through chromedriver as the WebDriver standard has it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Browser"]

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever a page asks of the network fails.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
# Of keys that have no letter.
KEYS = {"left": "\ue012", "right": "\ue014", "end": "\ue010", "home": "\ue011", "space": " ", "tab": "\ue004"}


class Browser:
    """One window. Skips the test where there is no Chromium or no chromedriver.

    Args:
        folder: for the profile.
        dark: whether pages are asked to be dark.
        size: of the window.
    """

    def __init__(self, folder: Path, dark: bool = False, size: tuple[int, int] = (1300, 1000)) -> None:
        chromium = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
        driver = shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("no chromium with chromedriver; on Debian: apt-get install chromium chromium-driver")
        # With port 0 it takes a free one, and says which.
        command = [driver, "--port=0", f"--log-path={folder / 'chromedriver.log'}"]
        environment = {**os.environ, "HOME": str(folder)}
        self._driver = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        try:
            self._root = f"http://127.0.0.1:{self._port()}"
            flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}"]
            flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
            options = {"binary": chromium, "args": flags}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._root += f"/session/{made['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._call("DELETE", "", None)
        finally:
            self._driver.terminate()
            self._driver.wait(20)

    def open(self, page: Path) -> None:
        """Load a file and wait until it has loaded."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def resize(self, width: int, height: int) -> None:
        """Give the page a width and a height in pixels, narrower than a window may be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)

    def command(self, name: str, **parameters: Any) -> Any:
        """One of Chromium's own commands."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        """What a function body of JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        """Click on the first element that fits a CSS selector."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def press(self, selector: str, *keys: str) -> None:
        """Type keys, such as ``"right"``, into an element."""
        text = "".join(KEYS[key] for key in keys)
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot", None)))

    def messages(self) -> list[str]:
        """Errors and warnings of the page's console."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def _find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def _port(self) -> int:
        assert self._driver.stdout is not None
        end = time.monotonic() + 60
        while time.monotonic() < end:
            line = self._driver.stdout.readline()
            if "started successfully on port" in line:
                return int(line.rsplit("port", 1)[1].strip(" .\n"))
        raise TimeoutError("chromedriver did not start within a minute")

    def _call(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            # The address is this machine's own, whatever proxy there is for others.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:500]) from None
