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
"""Refuse options of a command line that no config knows, or that need a library which is not there."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

__all__ = ["check_options", "closest_option", "first_key"]

_FLAG = re.compile(r"--?([A-Za-z_+][^=]*)(=.*)?", re.DOTALL)


def check_options(arguments: Sequence[str] | None = None, without_effect: Sequence[str] = ()) -> None:
    """Refuse options of ``python -m monai.bundle run`` that name no key of its config files.

    MONAI adds an unknown key to the config, where nothing reads it: ``--max_epoch 3`` would train for ``max_epochs``
    epochs all the same. Only what comes before the first ``#`` or ``::`` of an option is checked, since a wrong key
    further down is an argument that its class refuses.

    Args:
        arguments: of the command line; this process's by default. Does nothing when that is not MONAI's ``run``.
        without_effect: keys that the config has for MONAI's sake only; changing them is refused too.

    Raises:
        ValueError: names the option, the key that comes closest and the config files.
        ModuleNotFoundError: for ``--tracking mlflow`` without MLflow; names what to install.
    """
    arguments = sys.argv if arguments is None else arguments
    if list(arguments[1:2]) != ["run"] or Path(arguments[0]).parts[-3:-1] != ("monai", "bundle"):
        return
    options = _options(arguments[2:])
    files = _files(options.get("config_file", ""))
    keys = {first_key(key) for file in files for key in json.loads(Path(file).read_text(encoding="utf-8"))}
    if not files:
        return
    where = " and ".join(files)
    own = _own_options() | _tracking_options(options.get("tracking", ""))
    for option in options:
        key = first_key(option)
        if key in without_effect:
            raise ValueError(f"--{option} has no effect in {where}, which takes no `{key}`")
        if key not in keys | own:
            hint = closest_option(key, keys) or f"the keys are {', '.join(sorted(keys))}"
            raise ValueError(f"--{option} is no key of {where}: {hint}")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Options by name, with the value that follows; what comes after a bare ``--`` is fire's."""
    options = {}
    for position, argument in enumerate(arguments):
        if argument == "--":
            break
        match = _FLAG.fullmatch(argument)
        if match:
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            options[match[1].replace("-", "_")] = match[2][1:] if match[2] else following
    return options


def _files(value: str) -> list[str]:
    """The config files, of one name or of a list written out; none when some are no JSON, whose keys are not known."""
    names = ast.literal_eval(value) if value.lstrip().startswith(("[", "(")) else [value]
    return [str(name) for name in names] if all(str(name).endswith(".json") for name in names) else []


def closest_option(name: str, known: Collection[str]) -> str:
    """A question that names the known option which comes closest to a name; empty when none comes close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean --{close[0]}?" if close else ""


def first_key(key: str) -> str:
    """What comes before the first ``#`` or ``::`` of an option, without the ``+`` that merges."""
    return re.split("#|::", key.lstrip("+"))[0]


def _own_options() -> set[str]:
    """What MONAI's ``run`` and its workflow take themselves."""
    from monai.bundle import ConfigWorkflow, run

    return {*inspect.signature(run).parameters, *inspect.signature(ConfigWorkflow.__init__).parameters}


def _tracking_options(tracking: str) -> set[str]:
    """What ``--tracking`` makes options of: the values that MONAI's settings, or those in a file, put into a config."""
    from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

    if tracking == "mlflow" and importlib.util.find_spec("mlflow") is None:
        raise ModuleNotFoundError('--tracking mlflow needs MLflow: pip install "warpzoo[track]", or pip install mlflow')
    if tracking.endswith(".json"):
        settings = json.loads(Path(tracking).read_text(encoding="utf-8"))
    else:
        settings = DEFAULT_EXP_MGMT_SETTINGS.get(tracking, {})
    return set(settings.get("configs", {})) - set(settings.get("handlers_id", {}))
