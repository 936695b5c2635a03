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
"""Greedy and trained networks through one evaluation: overlap, regularity and time of a pair, side by side.

Run ``python -m benchmarks.greedy`` for the synthetic cohort, or

    python -m benchmarks.greedy --dataset hippocampus --dataset_dir DATA --spatial_size 48 64 48 \\
        --network convic_c=runs/dual_stream_pyramid/train/model.pt

Each row is a run of the ``dual_stream_pyramid`` bundle's ``evaluate.json``, whose folder keeps every pair's values.
Greedy needs ``pip install -c constraints.txt picsl_greedy``.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import format_table

__all__ = ["evaluate", "measure"]

CONFIGS = "bundles/dual_stream_pyramid/configs"
REPOSITORY = Path(__file__).resolve().parent.parent
COLUMNS = ("dice_before_mean", "dice_mean", "hd95_mean", "sdlogj", "ndv", "seconds")
GREEDY = {"Greedy": {}, "Greedy, affine first": {"affine": True}}


def measure(
    folder: Path, networks: Mapping[str, Path] | None = None, threads: int = 1, **data: Any
) -> list[dict[str, Any]]:
    """Evaluate Greedy, with and without an affine start, and networks of the bundle.

    Args:
        folder: gets a folder of results for each method.
        networks: checkpoint by decoder, such as ``{"convic_c": Path("model.pt")}``.
        threads: of Greedy and of PyTorch.
        data: options of ``evaluate.json`` for all, such as ``dataset`` and ``spatial_size``.

    Returns:
        a row a method: its name, means over the pairs (``seconds`` is wall time), ``pairs`` and ``threads``.
    """
    rows = []
    for name, options in GREEDY.items():
        rows.append(evaluate(name, folder, ["greedy"], threads, **options, threads=threads, **data))
    for decoder, checkpoint in (networks or {}).items():
        rows.append(evaluate(decoder, folder, [], threads, decoder=decoder, checkpoint=checkpoint, **data))
    return rows


def evaluate(name: str, folder: Path, overlays: Sequence[str], cores: int, **options: Any) -> dict[str, Any]:
    """One method's row.

    Raises:
        RuntimeError: when the evaluation fails; holds the end of what it said.
    """
    output = Path(folder).resolve() / name.replace(", ", "_").replace(" ", "_").lower()
    files = [f"{CONFIGS}/{file}.json" for file in ("evaluate", *overlays)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files), "--output_dir", str(output)]
    for key, value in {"pictures": 0, **options}.items():
        command += [f"--{key}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}: {' '.join(command)} failed:\n{(result.stdout + result.stderr)[-2000:]}")
    return {"method": name, **_read(output / "summary.csv"), "threads": cores}


def _read(path: Path) -> dict[str, Any]:
    with open(path, newline="", encoding="utf-8") as stream:
        summary = {row["metric"]: row for row in csv.DictReader(stream)}
    means = {name.removesuffix("_mean"): float(summary[name]["mean"]) for name in COLUMNS if name in summary}
    return {**means, "pairs": int(summary["seconds"]["count"])}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/greedy"), help="where results go")
    parser.add_argument("--network", action="append", default=[], metavar="DECODER=CHECKPOINT", help="may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--dataset_dir", type=Path)
    parser.add_argument("--spatial_size", type=int, nargs="+", default=[48, 48, 48])
    parser.add_argument("--split", default="test")
    given = parser.parse_args()
    networks = {decoder: Path(path).resolve() for decoder, path in (text.split("=", 1) for text in given.network)}
    data = {"dataset": given.dataset, "spatial_size": given.spatial_size, "split": given.split}
    if given.dataset_dir is not None:
        data["dataset_dir"] = given.dataset_dir.resolve()
    print(format_table(measure(given.folder, networks, given.threads, **data)))


if __name__ == "__main__":
    main()
