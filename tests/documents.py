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
"""What the documentation tells a reader to type, and where it leads them.

Blocks of commands are read by bash itself, with its loops, variables and continued lines, but nothing is run: every
program is replaced by one that writes down its name and arguments.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

_PROGRAMS = ("python", "python3", "torchrun", "make", "pip", "pytest", "tensorboard", "srun", "sbatch", "git", "mlflow")
_PROGRAMS += ("sha256sum",)
_PRELUDE = """
set -u
PATH=/nowhere
write_down() { printf '%s\\037' "$@" >> commands; printf '\\n' >> commands; }
command_not_found_handle() { write_down "unknown program" "$@"; }
cd() { write_down cd "$@"; }
"""
_BLOCK = re.compile(r"^( *)```bash\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str) -> list[str]:
    """The blocks of commands in a Markdown text."""
    return [block for _, block in _BLOCK.findall(text)]


def inline_commands(text: str) -> list[str]:
    """Commands inside a line of a Markdown text, such as ``make test``."""
    text = _BLOCK.sub("", text)
    return [" ".join(command.split()) for command in re.findall(r"`((?:python|make|torchrun|pip) [^`]+)`", text)]


def typed(block: str, folder: Path) -> list[list[str]]:
    """The commands that bash would start for a block, as programs with their arguments.

    Args:
        block: shell commands.
        folder: an empty folder to be in meanwhile.

    Raises:
        AssertionError: when bash reports an error, such as a variable that nothing sets.
    """
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / ".venv/bin/activate").touch()
    commands = folder / "commands"
    commands.write_text("")
    stubs = "".join(f'{name}() {{ write_down {name} "$@"; }}\n' for name in _PROGRAMS)
    result = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", _PRELUDE + stubs + block],
        cwd=folder,
        env={},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.stderr == "", f"{result.stderr}in:\n{block}"
    lines = commands.read_text().split("\037\n")[:-1]
    return [line.split("\037") for line in lines]


def links(text: str) -> list[str]:
    """What a Markdown text links to within the repository, without the anchors of the same page."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = (target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target))
    return [target for target in targets if not target.startswith("#")]


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown text's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def options(arguments: list[str]) -> dict[str, str]:
    """``--name value`` and ``--name=value`` of a command, by name; ``True`` for one without a value."""
    found: dict[str, str] = {}
    for position, argument in enumerate(arguments):
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            found[name] = value if equals else "True" if following.startswith("--") else following
    return found
