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
"""Time and memory of two implementations side by side, on a machine that others may be using.

Every benchmark hands over *builders*: module-level functions that prepare their inputs and return the call to measure::

    def build_ours(size: int) -> Callable[[], object]:
        image = torch.rand(1, 1, size, size, size)
        return lambda: smooth(image)

    row = compare("smoothing", build_ours, build_theirs, (96,), warm_up=(8,), against="scipy 1.11", size="96^3")

so that the preparation is never part of the figure, and so that the same builder can run in a fresh process, where
memory is measured. Times are medians over interleaved repetitions: a neighbour's load then falls on both sides alike.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Builder",
    "compare",
    "cost_in_fresh_process",
    "cost_in_this_process",
    "format_table",
    "median_times",
    "peak_memory_mb",
    "peak_of_process_mb",
    "threads",
]

Builder = Callable[..., Callable[[], object]]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
# glibc raises its mmap threshold as blocks are freed, and then keeps freed blocks; fixed, the peak is what was alive.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def median_times(callables: Mapping[str, Callable[[], object]], repeats: int = 7, warm_up: int = 1) -> dict[str, float]:
    """Median wall time of each callable, measured in turns (a, b, a, b, ...) so that drift and load hit all alike.

    Args:
        callables: what to time, by name. Each is called ``warm_up + repeats`` times.
        repeats: timed calls of each.
        warm_up: untimed calls of each, first.

    Returns:
        milliseconds by name, in the order given.

    Raises:
        ValueError: when ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warm_up):
        for call in callables.values():
            call()
    taken: dict[str, list[float]] = {name: [] for name in callables}
    for _ in range(repeats):
        for name, call in callables.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            taken[name].append(1000.0 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def cost_in_fresh_process(build: Builder, args: Sequence[Any] = (), repeats: int = 1) -> tuple[float, float]:
    """What a network costs: CPU seconds of one call, and peak resident memory above what the imports take.

    Memory holds everything that was built and the first call, which the time leaves out. CPU seconds on one thread are
    far less disturbed by others on the machine than wall time is.

    Args:
        build: a module-level function (it is pickled by name) that returns the call to measure.
        args: arguments of ``build``; PyTorch's generator is seeded before.
        repeats: timed calls, of which the fastest counts.

    Returns:
        CPU seconds, and mebibytes (2**20 bytes).
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost_in_this_process, (build, tuple(args), repeats))


def cost_in_this_process(build: Builder, args: tuple[Any, ...], repeats: int) -> tuple[float, float]:
    """As :func:`cost_in_fresh_process`, whose child calls it. Memory of earlier calls hides that of this one."""
    torch.set_num_threads(1)
    before = peak_of_process_mb()
    torch.manual_seed(0)
    call = build(*args)
    call()
    megabytes = peak_of_process_mb() - before
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken), megabytes


def peak_memory_mb(
    build: Builder, args: Sequence[Any] = (), *, warm_up: Sequence[Any] | None = None, num_threads: int = 1
) -> float:
    """Peak resident memory of one call above what was resident right before it, measured in a fresh process.

    The child imports, runs a tiny ``build(*warm_up)()`` (so that lazy imports and thread pools are not counted),
    prepares ``build(*args)``, notes its resident memory, and makes the one call. The result is kept until the peak is
    read, so outputs count and inputs do not.

    Args:
        build: a module-level function (it is pickled by name) that returns the call to measure.
        args: arguments of ``build``.
        warm_up: arguments of ``build`` for the warm-up call; ``None`` leaves the warm-up out.
        num_threads: threads for torch in the child.

    Returns:
        mebibytes (2**20 bytes); at least 0. Exact to the kernel's accounting on Linux; elsewhere a lower bound, since
        the process's earlier peak cannot be forgotten there.

    Raises:
        RuntimeError: when the call fails in the child; the message holds the child's error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with _environment(_ALLOCATOR):
        child = context.Process(target=_measure_in_child, args=(sender, build, tuple(args), warm_up, num_threads))
        child.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = "the process died before it could answer"
    finally:
        child.join()
        receiver.close()
    if isinstance(outcome, str):
        raise RuntimeError(f"measuring {getattr(build, '__name__', build)}{tuple(args)} failed: {outcome}")
    return float(outcome)


def compare(
    what: str,
    ours: Builder,
    theirs: Builder,
    args: Sequence[Any] = (),
    *,
    against: str,
    size: str,
    warm_up: Sequence[Any] | None = None,
    repeats: int = 7,
    num_threads: int = 1,
    memory: bool = True,
) -> dict[str, Any]:
    """Measure two builders on the same arguments.

    Args:
        what: what is computed, with the reader's words.
        ours: builder of our implementation.
        theirs: builder of the other one.
        args: arguments for both builders.
        against: name and version of the other implementation.
        size: the size in words, such as ``"96^3"``.
        warm_up: arguments for a tiny call before memory is measured.
        repeats: timed repetitions.
        num_threads: torch threads.
        memory: whether to measure memory too (two fresh processes); otherwise those entries are NaN.

    Returns:
        a row: ``what``, ``ours_ms``, ``theirs_ms``, ``ratio_time`` (theirs/ours: how many times faster ours is),
        ``ours_mb``, ``theirs_mb``, ``ratio_memory`` (theirs/ours), ``against``, ``size``, ``threads``.
    """
    with threads(num_threads):
        times = median_times({"ours": ours(*args), "theirs": theirs(*args)}, repeats)
    peaks = {"ours": float("nan"), "theirs": float("nan")}
    if memory:
        for name, build in (("ours", ours), ("theirs", theirs)):
            peaks[name] = peak_memory_mb(build, args, warm_up=warm_up, num_threads=num_threads)
    return {
        "what": what,
        "ours_ms": times["ours"],
        "theirs_ms": times["theirs"],
        "ratio_time": times["theirs"] / times["ours"],
        "ours_mb": peaks["ours"],
        "theirs_mb": peaks["theirs"],
        "ratio_memory": peaks["theirs"] / peaks["ours"] if peaks["ours"] else float("nan"),
        "against": against,
        "size": size,
        "threads": num_threads,
    }


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, one column a key of the first row."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` torch threads, and put the former number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside, and restore them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _measure_in_child(
    sender: Connection, build: Builder, args: Sequence[Any], warm_up: Sequence[Any] | None, num_threads: int
) -> None:
    """Body of the child process: sends mebibytes, or the error as text."""
    try:
        torch.set_num_threads(num_threads)
        if warm_up is not None:
            build(*warm_up)()
        call = build(*args)
        gc.collect()
        sender.send(_peak_of(call))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")


def _peak_of(call: Callable[[], object]) -> float:
    """Peak resident memory of ``call`` above the state before it, in mebibytes."""
    try:
        _CLEAR_REFS.write_text("5")  # makes the kernel forget the high-water mark so far
        resettable = True
    except OSError:
        resettable = False
    baseline = _status_kib("VmRSS") if resettable else _max_rss_kib()
    result = call()
    peak = _status_kib("VmHWM") if resettable else _max_rss_kib()
    del result
    return max(peak - baseline, 0) / 1024.0


def _status_kib(field: str) -> int:
    """A field of /proc/self/status, in kibibytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")


def peak_of_process_mb() -> float:
    """This process's highest resident memory so far, in mebibytes.

    From the kernel's own high-water mark where there is one: the number that ``getrusage`` gives a fresh process on
    Linux can be that of the process which started it.
    """
    return (_status_kib("VmHWM") if _STATUS.is_file() else _max_rss_kib()) / 1024.0


def _max_rss_kib() -> int:
    """The process's highest resident memory so far, in kibibytes (macOS counts in bytes)."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest // 1024 if sys.platform == "darwin" else highest


def _synchronize() -> None:
    """Wait for the GPU, whose calls return before the work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _cell(value: Any) -> str:
    """A table cell: numbers to three significant digits."""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
