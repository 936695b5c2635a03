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

import logging
import sys
from pathlib import Path
from types import ModuleType

__version__ = "0.1.0"

__all__ = ["__version__", "bundle_root", "data_splits_root"]

_scripts: dict[Path, dict[str, ModuleType]] = {}  # of bundles that were asked for before another one, by their folders


def bundle_root(name: str) -> str:
    """Find a bundle's folder, in a checkout (``bundles/<name>``) and in a shipped zip (``common/`` inside the bundle).

    MONAI puts the folder of the bundle that it runs on ``sys.path``, as it was typed; that one comes before a checkout,
    whose ``common`` may be installed or lie in the current directory. Its absolute path goes to the front: a relative
    one is lost when ITK changes the current directory, as it does while it loads, and the current directory, which
    stands there otherwise, may be another bundle with ``scripts`` of its own. A shipped bundle runs on the core that it
    brings.

    ``scripts`` is another package in each bundle. From this call on it is this bundle's; what was imported of another
    one keeps working, and is found again, the same modules, when that bundle is asked for.

    Args:
        name: the bundle, such as ``ssl_pretrain``.

    Returns:
        the absolute path of the folder that holds ``configs/`` and ``scripts/``.

    Raises:
        FileNotFoundError: when no place has it.
    """
    parent = _core().parent
    on_path = [folder for folder in map(_resolved, sys.path) if folder.name == name]
    candidates = [*dict.fromkeys([*on_path, parent / "bundles" / name, parent])]
    for candidate in candidates:
        if (candidate / "configs").is_dir() and (candidate / "scripts").is_dir():
            sys.path[:] = [str(candidate), *(entry for entry in sys.path if entry != str(candidate))]
            _prefer_core_of(candidate)
            _take_scripts_of(candidate)
            return str(candidate)
    raise FileNotFoundError(f"no bundle '{name}': looked for configs/ and scripts/ in {[str(c) for c in candidates]}")


def data_splits_root() -> Path:
    """The folder of dataset JSONs, which lies beside ``common/`` in a checkout and in a shipped zip."""
    return _core().parent / "data_splits"


def _core() -> Path:
    """The folder whose modules are imported as ``common.…``."""
    return _resolved(__path__[0])


def _resolved(entry: str) -> Path:
    return Path(entry).resolve()


def _prefer_core_of(bundle: Path) -> None:
    """Take modules from the core that a bundle brings, though another ``common`` was found first."""
    own = bundle / "common"
    if not (own / "__init__.py").is_file() or own.resolve() == _core():
        return
    if any(module.startswith("common.") for module in sys.modules):
        logging.getLogger(__name__).warning(
            "%s brings its own common/, but that of %s is in use", bundle, _core().parent
        )
    else:
        __path__[:] = [str(own)]


def _take_scripts_of(bundle: Path) -> None:
    """Let ``scripts`` be those of a bundle, and keep the modules of the one before."""
    loaded = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "scripts"}
    package = loaded.get("scripts")
    owner = None if package is None or package.__file__ is None else _resolved(package.__file__).parent.parent
    if owner == bundle:
        return
    for name in loaded:
        del sys.modules[name]
    if owner is not None:
        _scripts[owner] = loaded
    sys.modules.update(_scripts.get(bundle, {}))
