"""Description of the machine: processor, instruction sets, and environment variables that disable some of them."""

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
