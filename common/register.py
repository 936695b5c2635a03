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
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from common import bundle_root

__all__ = ["DEFAULT_BUNDLE", "command", "register"]

logger = logging.getLogger(__name__)

DEFAULT_BUNDLE = "dual_stream_pyramid"


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
        FileNotFoundError: when there is no such bundle.
        ValueError: for an option that ``inference.json`` does not have.
    """
    given = {"moving": moving, "fixed": fixed, **options, "output_dir": output_dir}
    arguments = command(bundle, **{name: value for name, value in given.items() if value is not None})
    logger.info("python -m monai.bundle %s", shlex.join(arguments))
    sys.argv = ["monai.bundle", *arguments]
    runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)


def command(bundle: str | None = None, **options: Any) -> list[str]:
    """What to type after ``python -m monai.bundle``.

    Args:
        bundle: a bundle's name.
        options: of its ``inference.json``.
    """
    config = Path(bundle_root(bundle or _own_bundle())) / "configs" / "inference.json"
    arguments = ["run", "--config_file", str(config)]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def _own_bundle() -> str:
    """The bundle that this core was shipped in, or the default of a checkout."""
    folder = Path(__file__).resolve().parent.parent
    return folder.name if (folder / "configs").is_dir() and (folder / "scripts").is_dir() else DEFAULT_BUNDLE
