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
"""A zip has the same bytes wherever it is made, holds what a bundle needs and nothing else, its documents fit it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from monai.bundle import download_large_files

from common.packaging import build_zip, bundle_names
from common.packaging.large_files import LIMIT

BUNDLES = bundle_names(Path(__file__).resolve().parents[2])
DOCUMENT_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


def read(path: Path) -> dict[str, bytes]:
    """The files of a zip by their path in its top folder."""
    with zipfile.ZipFile(path) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        assert tops == {path.name.rsplit("_v", 1)[0]}
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The smallest checkout that can be packed: a bundle ``one``, beside it ``two``."""
    root = tmp_path / "tree"
    metadata = {"version": "1.2.3", "changelog": {"1.2.3": "all of it"}}
    texts = {
        "bundles/one/LICENSE": "do what you like",
        "bundles/one/configs/metadata.json": json.dumps(metadata),
        "bundles/one/docs/README.md": "# One\n",
        "bundles/one/docs/data_license.txt": "none",
        "bundles/one/models/model.pt": "weights",
        "bundles/one/scripts/__init__.py": "",
        "bundles/one/configs/logging.conf": "",
        "bundles/two/configs/metadata.json": "{}",
        "common/__init__.py": "",
        "data_splits/README.md": "# Lists\n",
        "data_splits/brains.json": "{}",
        "docs/scaling.md": "# Scaling\n",
    }
    texts |= {f"bundles/one/configs/{name}.json": "{}" for name in ("train", "evaluate", "inference")}
    texts |= {"bundles/one/configs/multi_gpu_train.json": "{}"}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def readme(tree: Path, text: str) -> str:
    """What a README becomes in the zip."""
    (tree / "bundles/one/docs/README.md").write_text(text)
    return read(build_zip(tree, "one", tree / "dist"))["docs/README.md"].decode()


def test_copies_of_the_tree_give_the_same_bytes(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zips = []
    for number, place in enumerate(("here", "deep/down/there")):
        root = tmp_path / place
        for part in ("common", "data_splits", "docs", "bundles/gradirn"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(repository / part, root / part, copy_function=shutil.copyfile, ignore=ignored)
        for path in root.rglob("*"):
            os.utime(path, (1e9 + number * 1e8, 1e9 + number * 1e8))
            path.chmod(0o755 if path.is_dir() or number else 0o600)
        monkeypatch.chdir(root)
        before = os.umask(0o077 if number else 0o002)
        try:
            zips.append(build_zip(root, "gradirn", Path("dist")).read_bytes())
        finally:
            os.umask(before)
    zips.append(build_zip(repository, "gradirn", tmp_path).read_bytes())
    assert zips[0] == zips[1] == zips[2]


def test_time_permissions_system_and_compression_are_fixed(tree: Path) -> None:
    path = build_zip(tree, "one", tree / "dist")
    assert path == tree / "dist/one_v1.2.3.zip" and os.listdir(path.parent) == [path.name]
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0) and entry.create_system == 3
            assert entry.external_attr >> 16 == stat.S_IFREG | 0o644 and entry.compress_type == zipfile.ZIP_STORED


@pytest.fixture(scope="module", params=BUNDLES)
def packed(repository: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zip of each bundle."""
    return build_zip(repository, request.param, tmp_path_factory.mktemp("dist"))


def test_the_list_of_contents_is_whole_sorted_and_right(packed: Path) -> None:
    files = read(packed)
    lines = files.pop("sha256.txt").decode().splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in lines]  # two spaces: what sha256sum -c reads
    assert [match[2] for match in found if match] == sorted(files)
    for match in found:
        assert match and hashlib.sha256(files[match[2]]).hexdigest() == match[1]


def test_the_core_and_every_dataset_list_come_along(repository: Path, packed: Path) -> None:
    files = read(packed)
    core = {
        path.relative_to(repository).as_posix(): path.read_bytes() for path in (repository / "common").rglob("*.py")
    }
    assert len(core) > 80 and {name: files[name] for name in files if name.startswith("common/")} == core
    lists = {f"data_splits/{path.name}" for path in (repository / "data_splits").glob("*.json")}
    assert "data_splits/hippocampus.json" in lists
    assert {name for name in files if name.startswith("data_splits/")} == lists | {"data_splits/README.md"}


def test_a_zip_holds_what_is_under_version_control_and_nothing_else(repository: Path, packed: Path) -> None:
    bundle = packed.name.rsplit("_v", 1)[0]

    def listed(*options: str) -> set[str]:
        command = ["git", "-C", str(repository / "bundles" / bundle), "ls-files", *options]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    if not (repository / ".git").exists():
        pytest.skip("no checkout under version control")
    own = {name for name in read(packed) if name.split("/")[0] not in ("common", "data_splits", "sha256.txt")}
    pages = {name for name in own if (repository / name).is_file() and name.startswith("docs/")}
    gone = listed("--deleted")
    assert listed() - gone <= own <= listed("--cached", "--others", "--exclude-standard") | pages


def test_every_link_of_every_document_leads_somewhere_in_the_zip(packed: Path) -> None:
    files = read(packed)
    links = [
        (name, target)
        for name, content in files.items()
        if name.endswith(".md")
        for target in DOCUMENT_LINK.findall(content.decode())
        if not re.match(r"https?:|#|mailto:", target)
    ]
    assert links
    for name, target in links:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target.partition("#")[0]))
        assert path in files or any(other.startswith(path + "/") for other in files), f"{name}: {target}"


def test_no_command_of_a_readme_names_a_folder_of_the_checkout(packed: Path) -> None:
    files = read(packed)
    bundle, text = packed.name.rsplit("_v", 1)[0], files["docs/README.md"].decode()
    assert f"{bundle}/configs/train.json" in text and "root of the checkout" not in text
    assert not re.search(r"(?<![\w/])bundles/\w", text)
    for config in re.findall(rf"(?<![\w/]){bundle}/(configs/\w+\.json)", text):
        assert config in files, config


def test_runs_logs_caches_and_exports_stay_out(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    junk = ["models/verify_model.ts", "models/model.onnx", "scripts/__pycache__/x.py", "scripts/notes.txt"]
    junk += [
        "eval/metrics.csv",
        "runs/events",
        "run.log",
        "docs/.ipynb_checkpoints/README.md",
        "configs/train.json.orig",
    ]
    for name in junk:
        (tree / "bundles/one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / "bundles/one" / name).write_text("junk")
    for name in ("common/__pycache__/x.py", "common/a.pyc", "data_splits/facts/brains.json", "data_splits/make.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("junk")
    with caplog.at_level(logging.INFO):
        files = read(build_zip(tree, "one", tree / "dist"))
    assert b"junk" not in files.values()
    assert "verify_model.ts" in caplog.text and "left out" in caplog.text and "eval" in caplog.text


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "1.2.4", "changelog": {"1.2.3": ""}}, "'1.2.4', of which `changelog` says nothing.*1.2.3"),
        ({"version": "1.2.4"}, "'1.2.4', of which `changelog` says nothing"),
        ({"version": "v1", "changelog": {"v1": ""}}, "version is 'v1', expected three numbers"),
        ({}, "version is 'None'"),
    ],
)
def test_a_version_that_the_changelog_lacks_is_an_error(tree: Path, metadata: object, message: str) -> None:
    (tree / "bundles/one/configs/metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=f"one/configs/metadata.json: .*{message}"):
        build_zip(tree, "one", tree / "dist")
    assert not (tree / "dist").exists()


@pytest.mark.parametrize("name", ["LICENSE", "configs/metadata.json", "docs/data_license.txt", "models/model.pt"])
def test_a_missing_file_is_named(tree: Path, name: str) -> None:
    (tree / "bundles/one" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"bundles/one/{name} is missing"):
        build_zip(tree, "one", tree / "dist")


def test_an_unknown_bundle_is_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"no bundle 'three' .* expected one of \['one', 'two'\]"):
        build_zip(tree, "three", tree / "dist")


@pytest.fixture
def large(tree: Path) -> Path:
    """The tree with weights that are one byte too large."""
    with open(tree / "bundles/one/models/model.pt", "wb") as file:
        file.truncate(LIMIT + 1)
    return tree


def state_url(tree: Path, *lines: str) -> None:
    text = "\n".join(['large_files:\n- path: "models/model.pt"', *(f"  {line}" for line in lines)])
    (tree / "bundles/one/large_files.yml").write_text(text + "\n")


def test_a_large_file_needs_a_url(large: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model.pt has 25,000,001 bytes.*has to give a `url` for the path 'models/mod"
    ):
        build_zip(large, "one", large / "dist")
    state_url(large, "hash_type: md5")
    with pytest.raises(ValueError, match=r"'models/model.pt' has no `url`"):
        build_zip(large, "one", large / "dist")


def test_monai_fetches_a_large_file_that_stayed_out(large: Path, tmp_path: Path) -> None:
    weights = large / "bundles/one/models/model.pt"
    state_url(large, f'url: "{weights.as_uri()}"')
    path = build_zip(large, "one", large / "dist")
    assert path.stat().st_size < 10_000 and "models/model.pt" not in read(path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    download_large_files(str(tmp_path / "one"))
    assert (tmp_path / "one/models/model.pt").read_bytes() == weights.read_bytes()
    stated = read(path)["large_files.yml"].decode()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in stated and "sha256" in stated


def test_a_large_file_that_is_not_here_keeps_its_stated_hash(large: Path) -> None:
    (large / "bundles/one/models/model.pt").unlink()
    state_url(large, 'url: "https://example.org/model.pt"')
    with pytest.raises(ValueError, match=r"'models/model.pt' is not here, so `hash_val` and `hash_type` are needed"):
        build_zip(large, "one", large / "dist")
    state_url(large, 'url: "https://example.org/model.pt"', 'hash_val: "abc"', 'hash_type: "md5"')
    assert 'hash_val: "abc"' in read(build_zip(large, "one", large / "dist"))["large_files.yml"].decode()


def test_a_hash_of_another_file_is_refused(large: Path) -> None:
    state_url(large, 'url: "https://example.org/model.pt"', 'hash_val: "abc"', 'hash_type: "md5"')
    with pytest.raises(ValueError, match=r"its md5 is [0-9a-f]{32}, `large_files.yml` has abc"):
        build_zip(large, "one", large / "dist")


def test_a_small_file_is_in_the_zip_though_it_has_a_url(tree: Path) -> None:
    state_url(tree, 'url: "https://example.org/model.pt"')
    files = read(build_zip(tree, "one", tree / "dist"))
    assert files["models/model.pt"] == b"weights" and "large_files.yml" not in files


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[lists](../../../data_splits/README.md)", "[lists](../data_splits/README.md)"),
        ("[lists](../../../data_splits/)", "[lists](../data_splits)"),
        ("[a list](../../../data_splits/brains.json#L3)", "[a list](../data_splits/brains.json#L3)"),
        ("![picture](../models/model.pt)", "![picture](../models/model.pt)"),
        ('[one](../configs/train.json "the config")', '[one](../configs/train.json "the config")'),
        ("[pages](https://example.org/x), [below](#below)", "[pages](https://example.org/x), [below](#below)"),
        ("[two](../../two/configs/metadata.json) too", "two too"),
        ("[the tree](../../../)", "the tree"),
        ("```\ncohort[0](../nowhere)\n```", "```\ncohort[0](../nowhere)\n```"),
    ],
)
def test_links_lead_into_the_zip_or_leave_their_text(tree: Path, link: str, expected: str) -> None:
    assert readme(tree, link + "\n") == expected + "\n"


def test_a_page_that_is_linked_to_comes_along_with_what_it_links_to(tree: Path) -> None:
    (tree / "docs/scaling.md").write_text("[one](../bundles/one/docs/README.md) [more](slurm/nodes.md)\n")
    (tree / "docs/slurm").mkdir()
    (tree / "docs/slurm/nodes.md").write_text("`bundles/one/configs`\n")
    (tree / "docs/other.md").write_text("nobody asks for it\n")
    text = readme(tree, "see [scaling](../../../docs/scaling.md#slurm)\n")
    files = read(tree / "dist/one_v1.2.3.zip")
    assert text == "see [scaling](scaling.md#slurm)\n"
    assert files["docs/scaling.md"].decode() == "[one](README.md) [more](slurm/nodes.md)\n"
    assert files["docs/slurm/nodes.md"].decode() == "`one/configs`\n"
    assert "docs/other.md" not in files


def test_two_pages_of_one_name_are_an_error(tree: Path) -> None:
    (tree / "docs/README.md").write_text("# All pages\n")
    with pytest.raises(ValueError, match=r"cannot both be 'docs/README.md'"):
        readme(tree, "[all pages](../../../docs/README.md)\n")


def test_a_link_that_leads_nowhere_is_an_error(tree: Path) -> None:
    with pytest.raises(
        ValueError, match=r"bundles/one/docs/README.md: the link \(picture.png\) leads to .*picture.png"
    ):
        readme(tree, "![a picture](picture.png)\n")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("python -m monai.bundle run --config_file bundles/one/configs/train.json", None),
        (
            "\"['bundles/one/configs/train.json','bundles/two/configs/x.json']\"",
            "\"['one/configs/train.json','two/configs/x.json']\"",
        ),
        ("python bundles/one/scripts/convert.py A B", "PYTHONPATH=one python -m scripts.convert A B"),
        ("python -m common.data.ixi A B", "PYTHONPATH=one python -m common.data.ixi A B"),
        ("tests/bundles/one/test_jobs.py", "tests/bundles/one/test_jobs.py"),
        ("from the root of the checkout", "from the folder that holds `one/`"),
    ],
)
def test_commands_start_where_the_zip_was_unpacked(tree: Path, typed: str, expected: str | None) -> None:
    expected = "python -m monai.bundle run --config_file one/configs/train.json" if expected is None else expected
    assert readme(tree, f"`{typed}`\n") == f"`{expected}`\n"


def test_the_command_names_the_zip_its_size_and_its_sha256(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "common.package", "similarity_learning"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    path = next((tmp_path / "dist").glob("similarity_learning_v*.zip"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{path.relative_to(tmp_path)}  {path.stat().st_size} bytes  sha256 {digest}" in result.stdout


def test_all_packs_every_bundle(tmp_path: Path) -> None:
    from common.package import package

    package("all", str(tmp_path))
    assert sorted(path.name.rsplit("_v", 1)[0] for path in tmp_path.iterdir()) == BUNDLES and len(BUNDLES) == 5


def test_zips_are_made_in_a_checkout_alone(tree: Path) -> None:
    with zipfile.ZipFile(build_zip(Path(__file__).resolve().parents[2], "gradirn", tree)) as archive:
        archive.extractall(tree)
    command = [sys.executable, "-m", "common.package", "gradirn"]
    result = subprocess.run(command, cwd=tree / "gradirn", capture_output=True, text=True)
    assert result.returncode != 0 and "zips are made in a checkout" in result.stderr
