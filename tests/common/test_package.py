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
"""The core finds bundles wherever it lies, and imports nothing of them."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import common
from tests.bundles.commands import python


def test_a_bundle_is_found_in_the_checkout(repository: Path) -> None:
    assert Path(common.bundle_root("ssl_pretrain")) == repository / "bundles/ssl_pretrain"


def test_an_unknown_bundle_is_named(repository: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no bundle 'nothing'"):
        common.bundle_root("nothing")


def test_a_shipped_bundle_finds_itself(repository: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "ssl_pretrain"
    for part in ("configs", "scripts"):
        shutil.copytree(repository / "bundles/ssl_pretrain" / part, bundle / part)
    (bundle / "common").mkdir()
    shutil.copy(repository / "common/__init__.py", bundle / "common")
    code = "import common; print(common.bundle_root('ssl_pretrain'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=bundle, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == bundle.resolve()


def test_scripts_are_found_though_the_typed_path_was_lost(repository: Path, tmp_path: Path) -> None:
    # What MONAI does, and then ITK: a relative path that is looked up from another directory counts as absent for good.
    code = f"""
import os, sys
sys.path.insert(1, "bundles/ssl_pretrain")
os.chdir({str(tmp_path)!r})
import importlib.util
assert importlib.util.find_spec("scripts") is None
os.chdir({str(repository)!r})
assert importlib.util.find_spec("scripts") is None
import common
common.bundle_root("ssl_pretrain")
import scripts.ssl_head
"""
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, capture_output=True, text=True)


def ship(repository: Path, folder: Path, name: str) -> Path:
    """A shipped bundle with a core and scripts that can be told from others."""
    for part in ("configs", "scripts", "common", "data_splits"):
        (folder / name / part).mkdir(parents=True)
    (folder / name / "scripts/__init__.py").write_text(f"OF = {name!r}")
    shutil.copy(repository / "common/__init__.py", folder / name / "common")
    (folder / name / "common/marker.py").write_text(f"OF = {name!r}")
    return folder / name


def run(cwd: Path, *lines: str) -> str:
    """Lines of Python, with the current directory on the path as ``python -m`` has it."""
    command = [sys.executable, "-c", "\n".join(("import os, sys", *lines))]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


RUN_ONE = (
    "import common",
    "assert common.bundle_root('one') == os.path.realpath(typed)",
    "import common.marker, scripts",
    "assert common.marker.OF == scripts.OF == 'one', (common.marker.OF, scripts.OF)",
    "assert str(common.data_splits_root().parent) == os.path.realpath(typed)",
)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_shipped_bundle_is_used_from_any_current_directory(repository: Path, tmp_path: Path, absolute: bool) -> None:
    bundle, other = ship(repository, tmp_path, "one"), ship(repository, tmp_path, "two")
    # In the checkout and in another bundle, another `common` is imported first; in the latter `scripts` is there, too.
    for cwd in (repository, other, bundle, tmp_path):
        typed = str(bundle) if absolute else os.path.relpath(bundle, cwd)
        run(cwd, f"typed = {typed!r}", "sys.path.insert(1, typed)", *RUN_ONE)


def test_a_shipped_bundle_says_when_another_core_is_in_use(repository: Path, tmp_path: Path) -> None:
    bundle = ship(repository, tmp_path, "one")
    lines = ("import common.options", f"sys.path.insert(1, {str(bundle)!r})", "print(common.bundle_root('one'))")
    text = run(repository, *lines)
    assert f"{bundle} brings its own common/, but that of {repository} is in use" in text
    assert str(bundle) in text.splitlines()


def test_a_bundle_that_monai_runs_comes_before_the_checkout(repository: Path, tmp_path: Path) -> None:
    for part in ("configs", "scripts"):
        (tmp_path / "gradirn" / part).mkdir(parents=True)
    lines = (
        f"sys.path.insert(1, {str(tmp_path / 'gradirn')!r})",
        "import common",
        "print(common.bundle_root('gradirn'))",
    )
    assert run(repository, *lines).strip() == str((tmp_path / "gradirn").resolve())


def test_each_bundle_gets_its_own_scripts_in_one_process(repository: Path) -> None:
    code = """
import sys
import common
common.bundle_root("gradirn")
from scripts.network import GraDIRN as first
common.bundle_root("dual_stream_pyramid")
from scripts.pyramid import DualStreamPyramid as second
assert "scripts.network" not in sys.modules
import scripts
assert scripts.__file__.startswith(common.bundle_root("dual_stream_pyramid"))
common.bundle_root("gradirn")
from scripts.network import GraDIRN as again
assert again is first
common.bundle_root("dual_stream_pyramid")
from scripts.pyramid import DualStreamPyramid as again
assert again is second
"""
    python(repository, code)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


# What each part of the core may import of the core; see DESIGN: arrows point one way.
ALLOWED = {
    "spatial": {"spatial"},
    "losses": {"losses", "spatial"},
    "metrics": {"metrics", "spatial"},
    "networks": {"networks", "spatial"},
    "io": {"io", "spatial"},
    "transforms": {"transforms", "spatial", "io"},
    "data": {"data", "transforms", "spatial", "io"},
    "handlers": {"handlers", "spatial", "io", "metrics"},
}


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_arrows_point_one_way(repository: Path, part: str) -> None:
    for path in (repository / "common" / part).rglob("*.py"):
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("common.") and name.count(".") >= 1}
        assert ours <= ALLOWED[part], f"{path.relative_to(repository)} imports {ours - ALLOWED[part]}"


def test_the_core_knows_no_bundle(repository: Path) -> None:
    for path in (repository / "common").rglob("*.py"):
        assert not any(name.split(".")[0] in ("bundles", "scripts") for name in imported(path)), path
