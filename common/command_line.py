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
"""What all commands of ``python -m common`` share: one line for what a user can mend, and help that reads well."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from common.options import closest_option, first_key

__all__ = [
    "function_help",
    "option_lines",
    "reason_of",
    "require_device",
    "require_options",
    "require_parameters",
]

_WIDTH = 110
_COLUMN = 30  # where the meanings of options begin
_MEMORY = "; a larger --spacing needs less, and so does --device cpu of a GPU's"
_OURS = ("common.", "scripts.")


def reason_of(error: BaseException) -> str | None:
    """What to tell a user about an error that ended a command, in one line.

    MONAI wraps what happens inside a config in errors of its own, once for every level; what was said first counts.

    Args:
        error: as it was caught.

    Returns:
        the line, or None for an error that no input explains and whose traceback is needed.
    """
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"not enough memory: {text or 'none is left'}{_MEMORY}"
    known = isinstance(error, (ValueError, OSError, ImportError))
    ours = isinstance(error, RuntimeError) and type(error).__module__.startswith(_OURS)
    return (text or repr(error)) if known or ours else None


def require_options(given: Collection[str], known: Collection[str], command: str) -> None:
    """Refuse an option that a command does not have.

    Args:
        given: names, of which what comes before ``#`` or ``::`` counts.
        known: all that there are.
        command: ``register``, ``apply``, ...

    Raises:
        ValueError: names the option and the one that comes closest.
    """
    for name in given:
        key = first_key(name)
        if key not in known:
            hints = (closest_option(key, known), f"`python -m common {command} --help` lists them")
            raise ValueError(f"--{name} is no option of {command}: {' '.join(filter(None, hints))}")


def require_parameters(arguments: Sequence[str], function: Callable[..., Any], command: str) -> None:
    """Refuse ``--name value`` and ``--name=value`` where a function has no such parameter; ``-n`` is left to Fire.

    Raises:
        ValueError: as :func:`require_options`.
    """
    flags = (re.fullmatch(r"--(\w[\w-]+)(=.*)?", argument, re.DOTALL) for argument in arguments)
    names = [match[1].replace("-", "_") for match in flags if match]
    known = inspect.signature(function).parameters
    switched_off = {f"no{name}" for name in known}
    require_options([name for name in names if name not in switched_off], known, command)


def require_device(name: Any) -> None:
    """Refuse a device that this machine does not have, before anything is loaded.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1``, ...; nothing is looked at if it is empty or an expression of a config.

    Raises:
        ValueError: says what there is.
    """
    if not name or str(name).startswith("$"):
        return
    import torch

    try:
        device = torch.device(str(name))
    except RuntimeError as error:
        raise ValueError(f"--device {name} is none that PyTorch knows; expected cpu, cuda or cuda:1") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        there = f"it sees {count}, cuda:0 to cuda:{count - 1}" if count else "it sees none on this machine"
        raise ValueError(
            f"--device {name}: PyTorch has no such GPU, {there}; leave --device out, or give cpu. If there should be "
            "one, install the PyTorch that fits its driver"
        )


def option_lines(options: Mapping[str, tuple[str, Any]]) -> str:
    """A list of options for help.

    Args:
        options: by name, what each means and its default; None for one that its meaning tells.
    """
    return "\n".join(_option(name, *about) for name, about in options.items())


def function_help(function: Callable[..., Any], command: str) -> str:
    """Help from a function's signature and docstring.

    Args:
        function: with a docstring in Google's style.
        command: that calls it.
    """
    text = inspect.getdoc(function) or ""
    about, _, rest = text.partition("\nArgs:\n")
    meanings = _arguments(rest)
    options: dict[str, tuple[str, Any]] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            needed = parameter.default is parameter.empty
            meaning = meanings.get(name, "")
            options[name] = (f"needed: {meaning}", None) if needed else (meaning, parameter.default)
    lines = option_lines({**options, "debug": ("show where an error came from", None)})
    return f"{_plain(about).rstrip()}\n\nOptions of {command}\n{lines}"


def _option(name: str, meaning: str, default: Any) -> str:
    shown = "" if default is None or default is False else f" {_value(default)}"
    flag = f"  --{name}"
    start = flag.ljust(_COLUMN) if len(flag) < _COLUMN - 1 else f"{flag}  "
    return textwrap.fill(
        f"{_plain(meaning)}{shown}",
        width=_WIDTH,
        initial_indent=start,
        subsequent_indent=" " * _COLUMN,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _value(default: Any) -> str:
    """A default as it would be typed, in brackets."""
    return str(default).replace(" ", "") if isinstance(default, (list, tuple)) else f"[{default}]"


def _arguments(text: str) -> dict[str, str]:
    """The meanings of arguments, from what follows ``Args:``; it ends with the next section."""
    section = re.split(r"\n\S", text, maxsplit=1)[0]
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^ {4}(\w[\w, ]*): ((?:.|\n(?! {4}\w|$))*)", section, re.MULTILINE):
        for name in names.split(", "):
            found[name] = " ".join(meaning.split())
    return found


def _plain(text: str) -> str:
    """Without the marks of code; commands are indented, and a ``::`` that opens a diagram becomes a colon."""
    lines = re.sub(r"^``(python .*)``$", r"    \1", text, flags=re.MULTILINE).replace("``", "")
    return re.sub(r"::$", ":", lines, flags=re.MULTILINE)
