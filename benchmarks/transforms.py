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
"""What a random pair costs: CPU time and memory on one thread, against a limit.

The limits are less than half of what the published generator takes: 0.37 and 12 CPU-seconds, and 2 GB for
the larger size. Run as ``python -m benchmarks.transforms``.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import format_table, peak_of_process_mb

__all__ = ["build_pair", "measure"]

# (size, most CPU-seconds, most mebibytes resident in the whole process)
LIMITS = (((64, 64, 64), 0.15, 600.0), ((160, 192, 224), 5.0, 1200.0))


def build_pair(*size: int) -> Callable[[], object]:
    """A call that generates one pair, another one each time."""
    from common.transforms import RandImagePair

    return RandImagePair(size).set_random_state(seed=0)


def measure(repeats: int = 5) -> list[dict[str, Any]]:
    """Measure each size in a fresh process on one thread.

    Args:
        repeats: pairs a size; the time is their mean, since the pairs differ.

    Returns:
        rows of ``what``, ``size``, ``cpu_s``, ``peak_mb`` (resident in the whole process, imports included),
        ``limit_cpu_s``, ``limit_mb``.
    """
    rows = []
    for size, limit_cpu_s, limit_mb in LIMITS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cpu_s, peak_mb = pool.apply(_cost, (size, repeats))
        rows.append(
            {
                "what": "random pair",
                "size": "x".join(str(n) for n in size),
                "cpu_s": cpu_s,
                "peak_mb": peak_mb,
                "limit_cpu_s": limit_cpu_s,
                "limit_mb": limit_mb,
            }
        )
    return rows


def _cost(size: Sequence[int], repeats: int) -> tuple[float, float]:
    """Mean CPU-seconds of a pair and this process's peak resident memory in mebibytes."""
    torch.set_num_threads(1)
    build_pair(16, 16, 16)()
    call = build_pair(*size)
    start = time.process_time()
    for _ in range(repeats):
        call()
    cpu_s = (time.process_time() - start) / repeats
    return cpu_s, peak_of_process_mb()


if __name__ == "__main__":
    sys.stdout.write(format_table(measure()) + "\n")
