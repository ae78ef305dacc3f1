"""Measure speed and memory: sides timed in turn, the peak memory of a process, the bandwidth of a stream."""

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
_HOPELESS = 3.0
"""Times slower than the fastest."""
_STREAM_BYTES = 512 << 20
"""More than any processor's caches hold."""


@dataclass(frozen=True)
class Side:
    """One contender: ``run()`` does ``units`` units of work (tokens, say) on ``threads`` threads."""

    run: Callable[[], object]
    threads: int
    units: int = 1

    def seconds(self) -> float:
        """Of one unit, in one run."""
        torch.set_num_threads(self.threads)
        started = time.perf_counter()
        self.run()
        return (time.perf_counter() - started) / self.units


@dataclass(frozen=True)
class Timing:
    """Seconds per unit, one number for every round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def milliseconds(self) -> str:
        """The median, and in brackets the fastest and slowest round."""
        low, middle, high = (1e3 * x for x in (min(self.rounds), self.median, max(self.rounds)))
        return f"{middle:.3g} ({low:.3g}-{high:.3g})"

    def seconds(self) -> str:
        """Format the median and the range in seconds."""
        low, middle, high = min(self.rounds), self.median, max(self.rounds)
        return f"{middle:.2f} ({low:.2f}-{high:.2f})"

    def per_second(self) -> str:
        """Format the median and the range of units per second."""
        low, middle, high = (1 / x for x in (max(self.rounds), self.median, min(self.rounds)))
        return f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"


def in_turn(sides: Mapping[K, Side], rounds: int) -> dict[K, Timing]:
    """Time the sides a, b, a, b, ... so that whatever else the machine does meets all of them alike. A round before
    the first is not counted."""
    for side in sides.values():
        side.seconds()
    times: dict[K, list[float]] = {key: [] for key in sides}
    for _ in range(rounds):
        for key, side in sides.items():
            times[key].append(side.seconds())
    return {key: Timing(seconds) for key, seconds in times.items()}


def ratio(more: Timing, less: Timing) -> float:
    """How many times ``less`` is faster: the median over rounds, each side's beside the other's of the same round."""
    return statistics.median(a / b for a, b in zip(more.rounds, less.rounds, strict=True))


def fastest(times: Mapping[K, Timing]) -> K:
    return min(times, key=lambda key: times[key].median)


def hopeless(times: Mapping[K, Timing]) -> set[K]:
    """Ways whose fastest round is so far behind that they need not be timed again where the work is more."""
    best = {key: min(timing.rounds) for key, timing in times.items()}
    return {key for key, seconds in best.items() if seconds > _HOPELESS * min(best.values())}


def bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes per second that ``threads`` threads read from memory: the best round of a sum and of a matrix-vector
    product over 512 MiB."""
    rows = torch.ones(_STREAM_BYTES // 4 // 4096, 4096)
    vector = torch.ones(4096)
    sides = {"sum": Side(rows.sum, threads), "product": Side(lambda: rows @ vector, threads)}
    return _STREAM_BYTES / min(min(timing.rounds) for timing in in_turn(sides, rounds).values())


# --- memory


def return_freed_memory() -> None:
    """Give back what is no longer used, so that it does not count as there already (glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class PeakMemory:
    """``with PeakMemory() as memory:`` -- resident bytes of this process at the start, and the most since (Linux)."""

    before: int = field(init=False)

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.before = resident_pages * os.sysconf("SC_PAGE_SIZE")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = self.most() - self.before

    def most(self) -> int:
        """The most bytes that were resident since the start."""
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` in a fresh process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def threads_of(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"
