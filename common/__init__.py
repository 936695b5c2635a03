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
"""The core that every WarpZoo bundle stands on."""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.1.0"

__all__ = ["__version__", "bundle_root", "data_splits_root"]


def bundle_root(name: str) -> str:
    """Find a bundle's folder, in a checkout (``bundles/<name>``) and in a shipped zip (``common/`` inside the bundle).

    Its absolute path joins ``sys.path``. MONAI puts it there as it was typed, and a relative one is lost when ITK
    changes the current directory, as it does while it loads, before the bundle's scripts are asked for.

    Args:
        name: the bundle, such as ``ssl_pretrain``.

    Returns:
        the absolute path of the folder that holds ``configs/`` and ``scripts/``.

    Raises:
        FileNotFoundError: when neither place has it.
    """
    parent = Path(__file__).resolve().parent.parent
    candidates = [parent / "bundles" / name, parent]
    # An installed ``common`` knows no checkout: MONAI puts the bundle that is being run on the path.
    candidates += [Path(entry).resolve() for entry in sys.path if Path(entry).name == name]
    for candidate in candidates:
        if (candidate / "configs").is_dir() and (candidate / "scripts").is_dir():
            if str(candidate) not in sys.path:
                sys.path.insert(1, str(candidate))
            return str(candidate)
    raise FileNotFoundError(f"no bundle '{name}': looked for configs/ and scripts/ in {[str(c) for c in candidates]}")


def data_splits_root() -> Path:
    """The folder of dataset JSONs, which lies beside ``common/`` in a checkout and in a shipped zip."""
    return Path(__file__).resolve().parent.parent / "data_splits"
