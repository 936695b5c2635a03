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
"""Two scans in, a transform out: WarpZoo's default command, Greedy and ANTs on the same files, with as many threads.

    python -m benchmarks two_scans [--data ../shared/data] [--pairs 12] [--what hippocampus brain] [--threads 2]
        [--methods as_they_lie warpzoo refined greedy syn] [--output runs/two_scans.json]

Every method is a process from files to files, and everybody's transform is measured by the same code
(:class:`benchmarks.two_scans_pairs.PairMeasures`). ``search_s`` is the time it took to find the transform,
``command_s`` that of the whole command: the start of Python, reading, and writing (for WarpZoo the inverse, the
Jacobian, pictures and a report among the rest). WarpZoo's refinement and Greedy maximise a local correlation, as
``lncc`` does, and ANTs' SyN mutual information; label maps are seen by nobody, so Dice decides where there is one.

What the output holds is not measured again: an interrupted run goes on where it was. Greedy and ANTs are left out, with
a note, where they are not installed (``pip install -c constraints.txt -e ".[bench]"``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import format_table
from benchmarks.two_scans_methods import METHODS, available
from benchmarks.two_scans_pairs import WHAT, Pair, PairMeasures, list_pairs

__all__ = ["measure", "tables"]

DEFAULT = ("as_they_lie", "warpzoo", "refined", "greedy", "syn")
_MEASURED = ("dice", "lncc", "folds", "search_s", "command_s")
_SHARED = Path(os.environ.get("WARPZOO_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))


def measure(
    pairs: Sequence[Pair], output: Path, methods: Sequence[str] = DEFAULT, threads: int = 2, keep: Path | None = None
) -> dict[str, Any]:
    """Register pairs by every method that is installed, and measure what each found.

    Args:
        pairs: of files.
        output: JSON of the rows, written after each registration; those that it holds already are kept.
        methods: of :data:`benchmarks.two_scans_methods.METHODS`.
        threads: of all.
        keep: a folder for what the methods write; otherwise it is deleted.

    Returns:
        what the JSON holds: ``threads``; ``rows``, one for each transform, with ``what``, ``pair``, ``run`` (the
        method as asked for), ``method`` (its name in tables) and what was measured; ``errors``, of runs that failed,
        which are tried again the next time; ``seconds`` spent so far.

    Raises:
        ValueError: when the output was measured with another number of threads.
    """
    results = _read(output, threads)
    for name in (missing := [name for name in methods if not available(name)]):
        tqdm.write(f"{name} is left out: {', '.join(METHODS[name].needs)} is not installed")
    done = {(row["what"], row["pair"], row["run"]) for row in results["rows"]}
    todo = [(pair, name) for pair in pairs for name in methods if name not in missing]
    todo = [(pair, name) for pair, name in todo if (pair.what, pair.name, name) not in done]
    results["errors"] = []
    measures: tuple[Pair, PairMeasures] | None = None
    with tqdm(todo, desc="two scans", unit="run") as progress:
        for pair, name in progress:
            progress.set_postfix_str(f"{pair.name}, {name}")
            began = time.perf_counter()
            if measures is None or measures[0] is not pair:
                measures = pair, PairMeasures(pair)
            try:
                results["rows"] += _run(pair, name, measures[1], threads, keep)
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                results["errors"].append({"pair": pair.name, "run": name, "error": str(error)})
                tqdm.write(f"{pair.name}, {name} failed: {error}")
            results["seconds"] += time.perf_counter() - began
            _write(output, results)
    return results


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table for each kind of pair: means over the pairs, a line for each method."""
    parts = []
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        shown = [name for name in _MEASURED if any(name in row for row in own)]
        lines = []
        for method in dict.fromkeys(row["method"] for row in own):
            of_method = [row for row in own if row["method"] == method]
            means = {name: _mean([row[name] for row in of_method if name in row], name) for name in shown}
            lines.append({"method": method, **means, "pairs": len(of_method)})
        parts.append(f"{what}\n\n{format_table(lines)}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks two_scans",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=_SHARED / "data", help="folder of the data sets")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--pairs", type=int, default=12, help="how many hippocampus pairs")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT))
    parser.add_argument("--threads", type=int, default=2, help="of every method")
    parser.add_argument("--output", type=Path, default=Path("runs/two_scans.json"), help="where the JSON goes")
    parser.add_argument("--keep", type=Path, help="folder for the files that the methods write")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    pairs = [pair for what in given.what for pair in list_pairs(what, given.data.resolve(), given.pairs)]
    began = time.perf_counter()
    results = measure(pairs, given.output, given.methods, given.threads, given.keep)
    print(f"\n{tables(results['rows'])}")
    took = (time.perf_counter() - began) / 60
    print(f"{given.threads} thread(s); {took:.1f} min now, {results['seconds'] / 60:.1f} in all; see {given.output}")
    if results["errors"]:
        raise SystemExit(f"{len(results['errors'])} runs failed; the same command tries them again")


def _run(pair: Pair, name: str, measures: PairMeasures, threads: int, keep: Path | None) -> list[dict[str, Any]]:
    """The rows of one method on one pair."""
    with tempfile.TemporaryDirectory(prefix="two_scans_") as scratch:
        folder = Path(scratch) if keep is None else keep.resolve() / pair.name / name
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for found in METHODS[name].run(pair, folder, threads):
            times = {"search_s": found.search, "command_s": found.command}
            taken = {key: seconds for key, seconds in times.items() if seconds is not None}
            about = {"what": pair.what, "pair": pair.name, "run": name, "method": found.method}
            rows.append({**about, **measures(found.transform), **taken})
            tqdm.write(", ".join(f"{key} {_cell(key, value)}" for key, value in rows[-1].items() if key != "run"))
    return rows


def _read(output: Path, threads: int) -> dict[str, Any]:
    if not output.is_file():
        return {"threads": threads, "rows": [], "errors": [], "seconds": 0.0}
    results: dict[str, Any] = json.loads(output.read_text())
    if results["threads"] != threads:
        raise ValueError(
            f"{output} was measured with {results['threads']} threads, not {threads}: name another --output"
        )
    return results


def _write(output: Path, results: dict[str, Any]) -> None:
    """All or nothing, so that an interrupted run leaves what it had."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(output)


def _mean(values: Sequence[float], name: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return _cell(name, sum(known) / len(known)) if known else ""


def _cell(name: str, value: Any) -> str:
    """Seconds with one digit, measures with three."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1f}" if name.endswith("_s") else f"{value:.3f}"


if __name__ == "__main__":
    main()
