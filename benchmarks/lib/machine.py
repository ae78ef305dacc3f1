"""Name the machine that figures come from: its processor, the instruction sets, and the masks that hide some of them.
Needs nothing but torch."""

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
"""Sets that change how fast the operators run, and the flags of /proc/cpuinfo that show each."""
MASKS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables by which libraries are made to use fewer instruction sets than there are."""


@dataclass(frozen=True)
class Machine:
    """A processor or a GPU. Two runs belong to the same machine where :attr:`title` is the same."""

    processor: str
    features: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    """``NAME=value`` for each of :data:`MASKS` that is set."""

    @classmethod
    def here(cls, device: str = "cpu") -> Machine:
        """Describe this machine, or its GPU. The name of the host is no part of it."""
        if device == "cuda":
            return cls(torch.cuda.get_device_name())
        info = CPUINFO.read_text() if CPUINFO.exists() else ""
        name = re.search(r"model name\s*: (.+)", info)
        found = re.search(r"^flags\s*: (.+)", info, re.MULTILINE)
        flags = set(found[1].split()) if found else set()
        features = tuple(label for label, names in INSTRUCTION_SETS.items() if flags.intersection(names))
        masks = tuple(f"{mask}={os.environ[mask]}" for mask in MASKS if mask in os.environ)
        return cls(name[1].strip() if name else platform.machine(), features, masks)

    @property
    def title(self) -> str:
        """Processor, instruction sets and masks, in one line."""
        parts = (self.processor, ", ".join(self.features), ", ".join(self.masks))
        return "; ".join(part for part in parts if part)

    @property
    def slug(self) -> str:
        """The title in lower case, as a part of a file's name."""
        plain = re.sub(r"\((r|tm)\)", "", self.title.lower())
        return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def surroundings() -> str:
    """Cores, memory and the version of torch, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__.split('+')[0]}"


class OtherLoad:
    """Measure how much of the machine other processes have used since this was made (Linux)."""

    _DISTURBED = 0.1

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Return their share of all processor time, from 0 to 1. Children count as our own once they have ended."""
        (busy, total), (busy_before, total_before) = self._read(), self._start
        return max(0.0, busy - busy_before) / max(total - total_before, 1e-9)

    def __str__(self) -> str:
        share = self.share()
        warning = ", too much for these numbers to mean anything" if share > self._DISTURBED else ""
        return f"other processes used {share:.0%} of the processor meanwhile{warning}"

    @staticmethod
    def _read() -> tuple[float, float]:
        """Read the processor seconds of other processes, and of everything, idling included."""
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, idle, waiting = ticks[:5]
        second = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system) / second
        return busy - sum(os.times()[:4]), busy + (idle + waiting) / second
