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
"""``make bench``: every measurement as one table, and as JSON for whoever wants to plot it.

``python -m benchmarks [--output runs/benchmarks.json] [--size 96]
[--only spatial losses transforms dual_stream gradirn spatially_varying similarity_learning similarity_starts]``

``python -m benchmarks two_scans [--pairs 12] [--what hippocampus brain]``: registration beside Greedy and ANTs, which
takes data and some twenty minutes (:mod:`benchmarks.two_scans`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import monai
import torch
from tqdm import tqdm

from benchmarks.measure import format_table

AREAS = (
    "spatial",
    "losses",
    "transforms",
    "dual_stream",
    "gradirn",
    "spatially_varying",
    "similarity_learning",
    "similarity_starts",
)
_SIZED = ("spatial", "losses")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks.json"), help="where the JSON goes")
    parser.add_argument("--only", nargs="+", choices=AREAS, default=AREAS, help="areas to measure")
    parser.add_argument("--size", type=int, default=96, help="edge of the volumes of spatial and losses")
    options = parser.parse_args()
    # MONAI's own warnings, thousands of them over the repetitions.
    warnings.filterwarnings("ignore", module="monai")
    results: dict[str, Any] = {"environment": environment()}
    for area in tqdm(options.only, desc="measuring"):
        module = importlib.import_module(f"benchmarks.{area}")
        results[area] = module.measure(options.size) if area in _SIZED else module.measure()
        tqdm.write(f"\n{area}\n{format_table(results[area])}\n", file=sys.stdout)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {options.output}; times are medians, ratios are theirs over ours")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["two_scans"]:
        importlib.import_module("benchmarks.two_scans").main(sys.argv[2:])
    else:
        main()
