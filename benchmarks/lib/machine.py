"""Size and background load of the machine. Requires only torch."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def system_info() -> str:
    """Return the number of cores, memory size, and torch version in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__.split('+')[0]}"


class BackgroundLoad:
    """CPU usage of other processes since construction (Linux)."""

    _WARNING_THRESHOLD = 0.1

    def __init__(self) -> None:
        self._start = self._read()

    def fraction(self) -> float:
        """Return the fraction of all CPU time, from 0 to 1. Terminated children count as this process."""
        (busy, total), (busy_before, total_before) = self._read(), self._start
        return max(0.0, busy - busy_before) / max(total - total_before, 1e-9)

    def describe(self, has_servers: bool = False) -> str:
        """Return the usage in words, with a warning unless servers under measurement are included."""
        fraction = self.fraction()
        if has_servers:
            return f"other processes, servers included, used {fraction:.0%} of the processor meanwhile"
        warning = ", too much for these numbers to mean anything" if fraction > self._WARNING_THRESHOLD else ""
        return f"other processes used {fraction:.0%} of the processor meanwhile{warning}"

    @staticmethod
    def _read() -> tuple[float, float]:
        """Return the CPU seconds of other processes, and the total including idle time."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, idle, iowait = ticks[:5]
        second = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system) / second
        return busy - sum(os.times()[:4]), busy + (idle + iowait) / second
