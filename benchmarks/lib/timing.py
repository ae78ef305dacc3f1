"""Interleaved timing, peak memory of a process, and memory bandwidth."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")
_TOO_SLOW = 3.0
"""Slowdown relative to the fastest."""
_STREAM_BYTES = 512 << 20
"""Larger than any processor's caches."""


@dataclass(frozen=True)
class Timer:
    """Timer of ``run()``, which processes ``units`` units of work (such as tokens) on ``threads`` threads."""

    run: Callable[[], object]
    threads: int
    units: int = 1

    def seconds(self) -> float:
        """Run once and return the seconds per unit."""
        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        self.run()
        return (time.perf_counter() - started) / self.units


@dataclass(frozen=True)
class Timing:
    """Seconds per unit, one value per round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def milliseconds(self) -> str:
        """Format the median and the range in milliseconds."""
        low, middle, high = (_three_digits(1e3 * x) for x in (min(self.rounds), self.median, max(self.rounds)))
        return f"{middle} ({low}-{high})"

    def seconds(self) -> str:
        """Format the median and the range in seconds."""
        low, middle, high = min(self.rounds), self.median, max(self.rounds)
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    def per_second(self) -> str:
        """Format the median and the range of units per second."""
        low, middle, high = (1 / x for x in (max(self.rounds), self.median, min(self.rounds)))
        return f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"


def _three_digits(x: float) -> str:
    """Format with three significant digits, and numbers of at least 1,000 as whole ones."""
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def time_interleaved(timers: Mapping[K, Timer], rounds: int) -> dict[K, Timing]:
    """Run the timers as a, b, a, b, ..., so that background load affects all of them, after one warm-up round."""
    for timer in timers.values():
        timer.seconds()
    times: dict[K, list[float]] = {key: [] for key in timers}
    for _ in range(rounds):
        for key, timer in timers.items():
            times[key].append(timer.seconds())
    return {key: Timing(seconds) for key, seconds in times.items()}


def speedup(baseline: Timing, timing: Timing) -> float:
    """Return the speedup over ``baseline``: the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(baseline.rounds, timing.rounds, strict=True))


def fastest(times: Mapping[K, Timing]) -> K:
    return min(times, key=lambda key: times[key].median)


def too_slow(times: Mapping[K, Timing]) -> set[K]:
    """Return keys whose best round is over 3 times slower than the fastest, to be skipped in larger measurements."""
    best = {key: min(timing.rounds) for key, timing in times.items()}
    return {key for key, seconds in best.items() if seconds > _TOO_SLOW * min(best.values())}


def memory_bandwidth(threads: int, rounds: int = 5) -> float:
    """Return the read bandwidth of ``threads`` threads in bytes per second.

    It is the best round of a sum and of a matrix-vector product over 512 MiB.
    """
    rows = torch.ones(_STREAM_BYTES // 4 // 4096, 4096)
    vector = torch.ones(4096)
    timers = {"sum": Timer(rows.sum, threads), "product": Timer(lambda: rows @ vector, threads)}
    return _STREAM_BYTES / min(min(timing.rounds) for timing in time_interleaved(timers, rounds).values())


# --- memory


def trim_memory() -> None:
    """Return freed memory to the operating system (glibc), so that it does not count as resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class PeakMemory:
    """Context manager that measures this process's peak resident memory in bytes (Linux)."""

    before: int = field(init=False)

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before = resident_pages * os.sysconf("SC_PAGE_SIZE")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = self.peak() - self.before

    def peak(self) -> int:
        """Return the peak resident bytes since the start."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])


def run_in_subprocess(function: Callable[..., T], *arguments: Any) -> T:
    """Return ``function(*arguments)``, evaluated in a new process with separate memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def format_threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
