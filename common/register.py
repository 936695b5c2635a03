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
"""Register scans with a bundle's shipped weights: the short form of running its ``inference.json`` with MONAI."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fire.decorators import SetParseFns

from common import bundle_root
from common.command_line import require_device, require_options
from common.register_options import config_keys, options_help

__all__ = ["DEFAULT_BUNDLE", "command", "register", "register_help"]

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = "dual_stream_pyramid"

_TITLE = """Register one scan to another, or every pair of a list.

    python -m common register --moving moving.nii.gz --fixed fixed.nii.gz --output_dir registered
    python -m common register --pairs pairs.csv --output_dir registered --refine 50

The folder then has the moved scan, the transform there and back for ITK, ANTs and Slicer, and report.html."""
_OWN = ("moving", "fixed", "output_dir", "bundle")
_FILES = ("moving_label", "fixed_label", "moving_points", "fixed_points", "pairs", "dataset_dir", "checkpoint")
_OF_MONAI = ("logging_file", "tracking")
_MARKS = ("$", "@", "%")  # that make a value an expression of a config


# Fire would read a folder 2024 as a number, and one that is called a,b as two things.
@SetParseFns(**dict.fromkeys((*_OWN, *_FILES), str))  # type: ignore[untyped-decorator]
def register(
    moving: str | None = None,
    fixed: str | None = None,
    output_dir: str = "registered",
    bundle: str | None = None,
    **options: Any,
) -> None:
    """Register one scan to another, or every pair of a list.

    ``python -m common register --moving moving.nii.gz --fixed fixed.nii.gz --output_dir registered``
    ``python -m common register --pairs pairs.csv --output_dir registered --refine 50``

    Args:
        moving: the scan that is moved.
        fixed: the scan that it is moved to; the results lie on its grid.
        output_dir: folder of the results.
        bundle: whose network and weights; by default ``dual_stream_pyramid``, or, in a shipped zip, its own.
        options: any option of the bundle's ``inference.json``, such as ``pairs``, ``affine``, ``refine`` or
            ``checkpoint``.

    Raises:
        ValueError: for a bundle, an option or a device that there is not.
    """
    folder = _bundle_folder(bundle)
    if "tracking" not in options:  # whose options the config itself checks
        require_options(options, [*config_keys(folder), *_OWN, *_OF_MONAI], "register")
    require_device(options.get("device"))
    given = {"moving": moving, "fixed": fixed, **options, "output_dir": output_dir}
    given = {name: _as_file(value) for name, value in given.items() if value is not None}
    arguments = command(bundle, **given)
    logger.info("python -m monai.bundle %s", shlex.join(arguments))
    # What ends a run is said once, at its very end.
    logging.getLogger("ignite").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        # A config may run any code; this one is the bundle's own.
        warnings.filterwarnings("ignore", message="parsing config_file")
        import monai.bundle

        sys.argv = [str(Path(monai.bundle.__file__).with_name("__main__.py")), *arguments]
        monai.bundle.run(config_file=arguments[2], **given)


def command(bundle: str | None = None, **options: Any) -> list[str]:
    """What to type after ``python -m monai.bundle``.

    Args:
        bundle: a bundle's name.
        options: of its ``inference.json``.
    """
    arguments = ["run", "--config_file", str(_bundle_folder(bundle) / "configs" / "inference.json")]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def register_help(arguments: Sequence[str]) -> str:
    """What ``python -m common register --help`` prints, with the options of the bundle that is named.

    Args:
        arguments: of the command.
    """
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [value if flag == "--bundle" else flag[9:] for flag, value in pairs if flag.split("=")[0] == "--bundle"]
    folder = _bundle_folder(named[0] if named else None)
    text = f"{_TITLE}\n\n{options_help(folder, {'output_dir': 'registered', 'bundle': folder.name, 'debug': None})}"
    others = [name for name in _bundle_names() if name != folder.name]
    return text if not others else f"{text}\n\nOther bundles, with other options: {', '.join(others)}."


def _bundle_folder(name: str | None) -> Path:
    """The folder of a bundle, by default of the one that this core was shipped in, or of a checkout's best.

    Raises:
        ValueError: for a name that no bundle has; lists those that there are.
    """
    names = _bundle_names()
    name = name or (DEFAULT_BUNDLE if DEFAULT_BUNDLE in names else names[0])
    if name not in names:
        raise ValueError(f"--bundle {name}: there is none of this name; expected one of {', '.join(names)}")
    return Path(bundle_root(name))


def _bundle_names() -> list[str]:
    """The bundles of a checkout, or the one of a shipped zip."""
    root = Path(__file__).resolve().parent.parent
    folders = [root] if (root / "configs").is_dir() else [path.parent for path in root.glob("bundles/*/configs")]
    return sorted(folder.name for folder in folders)


def _as_file(value: Any) -> Any:
    """A file whose name looks like an expression of a config is a file all the same."""
    return f"./{value}" if isinstance(value, str) and value.startswith(_MARKS) and Path(value).exists() else value
