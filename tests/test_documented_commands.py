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
"""What the documentation tells a reader to type exists: configs, options, modules, make's targets, links and pictures.

The commands are not run here, which would take hours: see the tests of each bundle for that.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path

import monai.bundle
import pytest

from common.options import check_options
from common.register import DEFAULT_BUNDLE
from tests import documents
from tests.bundles.commands import python

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "data_splits/*.md", "bundles/*/docs/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)


BUNDLES = sorted(path.name for path in (REPOSITORY / "bundles").iterdir())


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(page: str, folder: Path) -> list[list[str]]:
    """Every command of a page."""
    text = read(page)
    found = [command for block in documents.blocks(text) for command in documents.typed(block, folder)]
    return found + [shlex.split(command) for command in documents.inline_commands(text)]


def config_files(value: str) -> list[str]:
    """The files that ``--config_file`` names."""
    return [str(name) for name in ast.literal_eval(value)] if value.startswith("[") else [value]


def module_and_rest(command: list[str]) -> tuple[str, list[str]]:
    """The module that a command starts with ``-m``, and what follows it."""
    position = command.index("-m")
    return command[position + 1], command[position + 2 :]


def problems(command: list[str]) -> list[str]:
    """What of a command does not exist."""
    program, *arguments = command
    if program == "unknown program":
        return [f"nobody knows the program {arguments[0]}"]
    if program == "make":
        targets = re.findall(r"^([a-z_]+):", read("Makefile"), flags=re.MULTILINE)
        return [f"make has no {name}" for name in arguments if "=" not in name and name not in targets]
    if program == "pip":
        return pip_problems(arguments)
    if program in ("python", "python3", "torchrun") and "-m" in arguments:
        return module_problems(*module_and_rest(arguments))
    if program in ("python", "python3") and arguments and arguments[0].endswith(".py"):
        return script_problems(REPOSITORY / arguments[0], arguments[1:])
    return []


def pip_problems(arguments: list[str]) -> list[str]:
    extras = {name for text in arguments for part in re.findall(r"\[(.*)\]", text) for name in part.split(",")}
    known = set(re.findall(r"^(\w+) = \[", read("pyproject.toml"), flags=re.MULTILINE))
    missing = [f"pyproject.toml has no extra {name}" for name in sorted(extras - known)]
    if "-c" in arguments and not (REPOSITORY / arguments[arguments.index("-c") + 1]).is_file():
        missing.append(f"no file {arguments[arguments.index('-c') + 1]}")
    return missing


def script_problems(path: Path, arguments: list[str]) -> list[str]:
    """Options are those that the module has somewhere as text, in ``argparse``'s way or as a parameter for ``fire``."""
    if not path.is_file():
        return [f"no file {path}"]
    package = "".join(part.read_text() for part in ([path] if path.stem != "__main__" else path.parent.glob("*.py")))
    names = [name for name in documents.options(arguments) if not re.search(rf'"--{name}"|\b{name}: ', package)]
    bundle = documents.options(arguments).get("bundle", DEFAULT_BUNDLE) if arguments[:1] == ["register"] else ""
    if "**options: Any" in package and (bundle or arguments[0]) in BUNDLES:
        keys = json.loads(read(f"bundles/{bundle or arguments[0]}/configs/inference.json"))
        names = [name for name in names if name not in keys]
    return [f"{path.name} has no --{name}" for name in names]


def module_problems(module: str, arguments: list[str]) -> list[str]:
    if module == "monai.bundle":
        return bundle_problems(*arguments)
    if module in ("venv", "pip", "pytest"):
        return []
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return [f"no module {module}"]
    path = Path(spec.origin)
    if path.stem == "__init__":
        path = path.with_name("__main__.py")
    return script_problems(path, arguments)


def bundle_problems(verb: str, *given: str) -> list[str]:
    # What a page has packed and downloaded has the files of the bundle.
    arguments = [re.sub(r"^zoo/", "bundles/", text) for text in given]
    options = documents.options(arguments)
    if verb != "run":
        function = getattr(monai.bundle, verb, None)
        if function is None:
            return [f"monai.bundle has no {verb}"]
        known = inspect.signature(function).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        return [] if takes_any else [f"{verb} has no --{name}" for name in options if name not in known]
    files = config_files(options.get("config_file", ""))
    paths = {value for value in [*files, *options.values()] if re.match(r"(bundles|data_splits)/", value)}
    missing = [f"no file {path}" for path in sorted({*paths, *files}) if not Path(path).exists()]
    if missing:
        return missing
    try:
        check_options(["monai/bundle/__main__.py", verb, *arguments])
    except ValueError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_exists(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands(page, tmp_path)
    monkeypatch.chdir(REPOSITORY)
    wrong = {shlex.join(command): texts for command in found if (texts := problems(command))}
    assert wrong == {}
    assert found or "```bash" not in read(page)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    for link in documents.links(read(page)):
        target, _, anchor = link.partition("#")
        path = (REPOSITORY / page).parent / target
        assert path.exists(), link
        assert not anchor or path.suffix != ".md" or anchor in documents.anchors(path.read_text()), link
        tracked = subprocess.run(["git", "ls-files", str(path)], cwd=REPOSITORY, capture_output=True, text=True).stdout
        assert tracked or not (REPOSITORY / ".git").exists(), f"{link} is not part of the repository"


@pytest.mark.parametrize("bundle", sorted(path.name for path in (REPOSITORY / "bundles").iterdir()))
def test_components_take_what_documented_options_give_them(repository: Path, bundle: str, tmp_path: Path) -> None:
    """Options below a component, such as ``--network_def#norm batch``, in each command that any page has."""
    runs = []
    for page in (page for page in PAGES if f"bundles/{bundle}/configs" in read(page)):
        for command in commands(page, tmp_path):
            if "monai.bundle" in command and "run" in command and f"bundles/{bundle}/configs" in " ".join(command):
                given = documents.options(command)
                runs.append((config_files(given.pop("config_file")), {key: given[key] for key in given if "#" in key}))
    code = f"""
import json, sys
sys.path.insert(1, "bundles/{bundle}")
from monai.bundle import ConfigParser
from tests.bundles.config_rules import references, targets
found = []
for files, options in json.loads({json.dumps(json.dumps(runs))}):
    parser = ConfigParser()
    parser.read_config(files)
    for key, value in options.items():
        parser[key] = value
    found += [(files, options, problem) for problem in targets(parser.get()) + references(parser.get(), ["run"])]
print(json.dumps(found))
"""
    assert json.loads(python(repository, code).splitlines()[-1]) == []
    assert len(runs) > 4


def test_options_below_a_key_that_the_tables_of_options_name_are_taken(repository: Path) -> None:
    for page in PAGES:
        bundle = Path(page).parts[1] if page.startswith("bundles/") else None
        keys = set(re.findall(r"`--?([a-z_]+)#", read(page))) | set(re.findall(r"^\| .*?`([a-z_]+)#", read(page), re.M))
        if bundle and keys:
            files = (repository / f"bundles/{bundle}/configs").glob("*.json")
            known = {key for path in files for key in json.loads(path.read_text())}
            assert keys <= known, page


def test_bash_reads_loops_variables_and_continued_lines(tmp_path: Path) -> None:
    block = """
C="--size [4,4]"   # a comment
for n in 1 2; do
    weights=None; [ $n = 2 ] && weights=x.pt
    python -m module $C \\
        --weights $weights "two words"
done
nosuchprogram --help
"""
    first, second, unknown = documents.typed(block, tmp_path)
    assert first == ["python", "-m", "module", "--size", "[4,4]", "--weights", "None", "two words"]
    assert second[-2:] == ["x.pt", "two words"] and unknown == ["unknown program", "nosuchprogram", "--help"]
    assert problems(unknown) == ["nobody knows the program nosuchprogram"]
    with pytest.raises(AssertionError, match="B: unbound variable"):
        documents.typed("python $B/train.json", tmp_path)
    with pytest.raises(AssertionError, match="syntax error"):
        documents.typed("for n in 1 2; do echo", tmp_path)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("make test DEMO=runs", ""),
        ("make nothing", "make has no nothing"),
        ("python -m benchmarks --only gradirn", ""),
        ("python -m benchmarks --nothing 1", "no --nothing"),
        ("python -m common.nothing", "no module common.nothing"),
        ("python -m common register --moving a.nii --fixed b.nii --refine 5", ""),
        ("python -m common register --bundle gradirn --moving a.nii --fixed b.nii --stacks True", ""),
        ("python -m common register --moving a.nii --fixed b.nii --stacks True", "no --stacks"),
        ("python bundles/gradirn/scripts/nothing.py a b", "no file"),
        ("pip install -c constraints.txt -e .[test,track]", ""),
        ("pip install .[nothing]", "no extra nothing"),
        ("python -m monai.bundle run --config_file bundles/gradirn/configs/train.json --max_epochs 3", ""),
        ("python -m monai.bundle run --config_file bundles/gradirn/configs/train.json --max_epoch 3", "max_epoch"),
        ("python -m monai.bundle run --config_file bundles/gradirn/configs/nothing.json", "no file"),
        ("torchrun -m monai.bundle run --config_file \"['bundles/gradirn/configs/nothing.json']\"", "no file"),
        ("python -m monai.bundle download --name x --nothing y", "no --nothing"),
        ("python -m monai.bundle nothing", "has no nothing"),
    ],
)
def test_a_command_that_cannot_work_is_found(command: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    found = problems(shlex.split(command))
    assert (len(found) == 1 and problem in found[0]) if problem else found == []


def test_what_a_text_holds() -> None:
    text = "# A b, c!\n[x](y.md#a) ![p](q.png) [w](https://z) [self](#a)\n"
    text += "```bash\nmake test\n```\nor `make demo`, `python -m x`\n"
    assert documents.blocks(text) == ["make test\n"]
    assert documents.links(text) == ["y.md#a", "q.png"]
    assert documents.anchors(text) == {"a-b-c"}
    assert documents.inline_commands(text) == ["make demo", "python -m x"]
    assert documents.options(["run", "--a", "1", "--b=2", "--c", "--d", "-1"]) == {
        "a": "1",
        "b": "2",
        "c": "True",
        "d": "-1",
    }
