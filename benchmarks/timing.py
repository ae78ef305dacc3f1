"""What the speed benchmarks measure with: sides timed in turn, peak memory of a child process, and on what machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

K = TypeVar("K")
T = TypeVar("T")
_HOPELESS = 3.0
"""Times slower than the fastest."""
_DISTURBED = 0.1
"""Share of the machine's processor time that others may use."""


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
        self.before = psutil.Process().memory_info().rss
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


# --- the machine


def threads_of(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def machine() -> str:
    """Processor, cores, matrix instructions, memory and torch, in one line. No name of a host."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.+)", info)
    flags = {"avx512_bf16": "AVX512-BF16", "avx512_vnni": "AVX512-VNNI", "amx_bf16": "AMX-BF16"}
    units = [label for flag, label in flags.items() if re.search(rf"\b{flag}\b", info)]
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{name[1] if name else platform.machine()}, {os.cpu_count()} cores, {', '.join(units) or 'no BF16 units'}, "
        f"{memory:.0f} GiB; torch {torch.__version__.split('+')[0]}"
    )


class OtherLoad:
    """How much of the machine other processes used since this was made: a benchmark on a busy one says little."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Of all processor time, from 0 to 1. Children count as our own once they have ended."""
        (busy, total), (busy_before, total_before) = self._read(), self._start
        return max(0.0, busy - busy_before) / max(total - total_before, 1e-9)

    def __str__(self) -> str:
        share = self.share()
        warning = ", too much for these numbers to mean anything" if share > _DISTURBED else ""
        return f"other processes used {share:.0%} of it meanwhile{warning}"

    @staticmethod
    def _read() -> tuple[float, float]:
        """Processor seconds of others, and of everything, idling included."""
        times = psutil.cpu_times()
        busy = times.user + times.system
        idle = times.idle + getattr(times, "iowait", 0.0)
        return busy - sum(os.times()[:4]), busy + idle
