"""Description of the machine: processor, instruction sets, and environment variables that disable some of them.

Requires only torch.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTION_SETS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "BF16": ("avx512_bf16", "avx_bf16"),
    "AMX": ("amx_bf16",),
}
"""Instruction sets that affect speed, with their flags in /proc/cpuinfo."""
MASKS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that restrict the instruction sets of libraries."""


@dataclass(frozen=True)
class Machine:
    """A processor or a GPU, identified by :attr:`title`."""

    processor: str
    features: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    """``NAME=value`` for each variable of :data:`MASKS` that is set."""

    @classmethod
    def here(cls, device: str = "cpu") -> Machine:
        """Describe this machine's processor or GPU, without its host name."""
        if device == "cuda":
            return cls(torch.cuda.get_device_name())
        info = CPUINFO.read_text() if CPUINFO.exists() else ""
        name = re.search(r"model name\s*: (.+)", info)
        generation = re.search(r"cpu family\s*: (\d+)\s+model\s*: (\d+)", info)
        found = re.search(r"^flags\s*: (.+)", info, re.MULTILINE)
        flags = set(found[1].split()) if found else set()
        features = tuple(label for label, names in INSTRUCTION_SETS.items() if flags.intersection(names))
        masks = tuple(f"{mask}={os.environ[mask]}" for mask in MASKS if mask in os.environ)
        processor = name[1].strip() if name else platform.machine()
        if generation:  # processors of several generations share a name on virtual machines
            processor += f", family {generation[1]} model {generation[2]}"
        return cls(processor, features, masks)

    @property
    def title(self) -> str:
        """Processor, instruction sets, and masks in one line."""
        parts = (self.processor, ", ".join(self.features), ", ".join(self.masks))
        return "; ".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """Title in a form suitable for file names."""
        plain = re.sub(r"\((r|tm)\)", "", self.title.lower())
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


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
