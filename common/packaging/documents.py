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
"""Documents of a checkout, as they have to read in a shipped bundle.

There, links point into the zip, commands start from the folder that it was unpacked to, and ``common`` lies in the
bundle. Pages of the checkout's ``docs/`` that a document links to come along.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["adapt_documents"]

logger = logging.getLogger(__name__)

_LINK = re.compile(r'(?P<shown>!?\[(?P<text>[^\]]*)\])\((?P<target>[^()\s]+)(?P<title>\s+"[^"]*")?\)')
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#", re.IGNORECASE)


def adapt_documents(root: Path, bundle: str, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """Rewrite the links and commands of all documents of a zip.

    A link to what is not in the zip leaves its text behind: another bundle has no address that stays.

    Args:
        root: of the checkout.
        bundle: the one that is packed.
        contents: by path within the zip.

    Returns:
        the contents with other documents, and the pages that they link to.

    Raises:
        ValueError: names a document and a link of it that leads nowhere in the checkout.
    """
    contents = dict(contents)
    waiting = [name for name in contents if name.endswith(".md")]
    while waiting:
        name = waiting.pop()
        source = _place_in_checkout(root, bundle, name)
        linked = _pages(root, source, contents[name].decode())
        for page in linked:
            if page not in contents:
                contents[page] = (root / page).read_bytes()
                waiting += [page] if page.endswith(".md") else []
            elif (root / "bundles" / bundle / page).is_file():
                raise ValueError(
                    f"{root / page} and {root / 'bundles' / bundle / page} cannot both be '{page}' of a zip"
                )
    for name in contents:
        if name.endswith(".md"):
            contents[name] = _adapt(root, bundle, name, contents).encode()
    return contents


def _place_in_checkout(root: Path, bundle: str, name: str) -> str:
    own = f"bundles/{bundle}/{name}"
    return own if (root / own).is_file() else name


def _place_in_zip(bundle: str, path: str) -> str | None:
    """Where a path of the checkout would be in the zip; None for what is never there."""
    own = f"bundles/{bundle}"
    if path == own:
        return "."
    if path.startswith(own + "/"):
        return path[len(own) + 1 :]
    return path if path.split("/")[0] in ("common", "data_splits", "docs") else None


def _pages(root: Path, source: str, text: str) -> list[str]:
    """What a document links to in the checkout's ``docs/``."""
    found: list[str] = []

    def collect(match: re.Match[str]) -> str:
        path = _resolve(source, match["target"])
        if path is not None and path.startswith("docs/") and (root / path).is_file():
            found.append(path)
        return match[0]

    _outside_code(collect, text)
    return found


def _adapt(root: Path, bundle: str, name: str, contents: Mapping[str, bytes]) -> str:
    """One document's text."""
    source = _place_in_checkout(root, bundle, name)

    def relink(match: re.Match[str]) -> str:
        path = _resolve(source, match["target"])
        if path is None:
            return match[0]
        if not (root / path).exists():
            raise ValueError(
                f"{root / source}: the link ({match['target']}) leads to {root / path}, which is not there"
            )
        place = _place_in_zip(bundle, path)
        if place is None or not (place in contents or _is_folder(place, contents)):
            logger.info("%s: '%s' stays without its link, since %s is not in the zip", source, match["text"], path)
            return match["text"]
        anchor = "".join(match["target"].partition("#")[1:])
        relative = posixpath.relpath(place, posixpath.dirname(name) or ".")
        return f"{match['shown']}({relative}{anchor}{match['title'] or ''})"

    return _commands(bundle, _outside_code(relink, contents[name].decode()))


def _resolve(source: str, target: str) -> str | None:
    """The path in the checkout that a link leads to; None for addresses and places of the same page."""
    if _ELSEWHERE.match(target):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))


def _is_folder(place: str, contents: Mapping[str, bytes]) -> bool:
    return place == "." or any(name.startswith(place + "/") for name in contents)


def _outside_code(replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace the links of a text but not what looks like one in a block of code."""
    lines, code = [], False
    for line in text.splitlines(keepends=True):
        if line.lstrip().startswith("```"):
            code = not code
        lines.append(line if code else _LINK.sub(replace, line))
    return "".join(lines)


def _commands(bundle: str, text: str) -> str:
    """Commands that are typed in the folder where zips are unpacked, each to its own folder."""
    names = r"[a-z]\w*"  # Of any bundle, whether it is in this tree or not: every tree gives the same bytes.
    text = re.sub(rf"\bpython bundles/({names})/scripts/(\w+)\.py", r"PYTHONPATH=\1 python -m scripts.\2", text)
    text = re.sub(rf"(?<![\w/.])bundles/({names})\b", r"\1", text)
    text = re.sub(r"\bpython -m common\b(?=[. ])", f"PYTHONPATH={bundle} python -m common", text)
    return text.replace("the root of the checkout", f"the folder that holds `{bundle}/`")
