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
"""``python -m common <command>``: what WarpZoo does beside a bundle's configs.

``register`` two scans or a list of pairs; ``apply`` a transform to images and points; ``export`` a network;
``package`` a bundle. ``python -m common <command> --help`` says what each takes.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from common.command_line import function_help, reason_of, require_parameters

# Imported when asked for: packing a bundle should not wait for PyTorch.
COMMANDS = {
    "register": ("common.register", "register"),
    "apply": ("common.apply", "apply"),
    "export": ("common.export", "export"),
    "package": ("common.package", "package"),
}


def main() -> None:
    """Run the command that the command line names; what a user can mend ends it with one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(__doc__)
        sys.exit(0 if name in ("--help", "-h") else 2)
    # PyTorch's threads, once it is imported, wait for each other without a rest: beside another program that keeps one
    # of two cores busy, a network takes ten times as long. Asleep they cost little on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in arguments
    try:
        _run(name, [argument for argument in arguments if argument != "--debug"])
    except Exception as error:
        reason = reason_of(error)
        if debug or reason is None:
            raise
        sys.stdout.flush()
        print(f"error: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)


def _run(name: str, arguments: list[str]) -> None:
    import fire

    module, function = (importlib.import_module(COMMANDS[name][0]), COMMANDS[name][1])
    wanted: Callable[..., Any] = getattr(module, function)
    if {"--help", "-h"} & set(arguments):
        print(module.register_help(arguments) if name == "register" else function_help(wanted, name))
        return
    if name != "register":  # which takes the options of a config
        require_parameters(arguments, wanted, name)
    fire.Fire(wanted, command=arguments, name=f"python -m common {name}")


if __name__ == "__main__":
    main()
