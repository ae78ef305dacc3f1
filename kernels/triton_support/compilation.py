"""Compilation of kernels without a GPU, and the figures of the compiled code.

For NVIDIA the figures come from the binary (``cuobjdump``, ``nvdisasm``, both part of the triton package), for AMD from
the metadata of the assembly.
"""

from __future__ import annotations

import collections
import importlib
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.triton_support.plans import Plan
from kernels.triton_support.tiles import Tile

_SPILLS_LIMITED_FROM = (3, 9)
"""The version of Triton that the limits on spills are set for."""
_THREADS = {"gfx942": 64}
"""Threads per warp, where not 32."""
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory that one program can have."""
_REGISTERS = {"sm_80": 65536, "sm_90": 65536, "sm_100": 65536, "gfx942": 131072}
"""Registers of 32 bits of a multiprocessor."""
_SHARED_PER_MULTIPROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
_MAX_THREADS = 2048
MATRIX_INSTRUCTIONS = {
    "sm_80": r"HMMA|IMMA|QMMA",
    "sm_90": r"HGMMA|HMMA|QGMMA",
    "sm_100": r"UTC\w*MMA|HMMA",
    "gfx942": r"v_mfma",
}
_GROUPS = {
    "matrix": "",
    "async copy": r"LDGSTS|UBLKCP|UTMALDG|UTMACCTMALDG",
    "wide load": r"LDG\.E\S*\.(?:128|64)\b|LDG\.E\.ENL2\.256|(?:global|buffer)_load_dwordx[234]",
    "load": r"LDG\b|LDG\.|(?:global|buffer)_load",
    "atomic": r"REDG?\b|REDG?\.|ATOMG|(?:global|buffer)_atomic",
}


@dataclass(frozen=True)
class Compiled:
    """Figures of a compiled kernel."""

    plan: str
    architecture: str
    tile: str
    registers: int
    """Per thread."""
    shared: int
    """Bytes of shared memory per program."""
    spills: int
    """Bytes of registers per thread that are kept in memory instead."""
    warps: int
    programs: int
    """Programs that a multiprocessor holds at a time."""
    instructions: dict[str, int]
    """Matrix instructions, asynchronous copies, loads of at least 8 bytes, all loads, and atomic additions."""
    matrix_kind: str
    """Most frequent matrix instruction, without its suffixes."""
    loop: int = 0
    """Instructions of the largest innermost loop; 0 for AMD, whose listing is not read for loops."""

    @property
    def uses_old_instructions(self) -> bool:
        """True if products run on warp-level instructions on a GPU that has faster ones."""
        return self.matrix_kind == "HMMA" and self.architecture != "sm_80"

    def faults(self, plan: Plan, check_spills: bool = True) -> list[str]:
        """Return the stated limits of the plan that the figures exceed, as sentences."""
        found = []
        if self.shared > SHARED_BYTES[self.architecture]:
            found.append(f"needs {self.shared:,} bytes of shared memory, of {SHARED_BYTES[self.architecture]:,}")
        allowed = plan.max_spills.get(self.architecture, 0)
        if check_spills and self.spills > allowed:
            found.append(f"spills {self.spills} bytes, at most {allowed} allowed")
        if plan.multiplies and not self.instructions["matrix"]:
            found.append("has no matrix instruction")
        if self.architecture in plan.copies_ahead and not self.instructions["async copy"]:
            found.append("has no asynchronous copy")
        if not self.instructions["wide load"] and not self.instructions["async copy"]:
            found.append("has no load wider than 4 bytes")
        return [f"{self.plan}, {self.architecture}, {self.tile}: {fault}" for fault in found]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def limits_spills() -> bool:
    """Return whether the limits on spills hold for the installed compiler: Triton 3.6 spills more in a few kernels."""
    version = importlib.import_module("triton").__version__
    return tuple(map(int, version.split(".")[:2])) >= _SPILLS_LIMITED_FROM


def compile_plan(plan: Plan, architecture: str, tile: Tile) -> Compiled:
    """Compile a kernel for an architecture. Raises an exception of triton if that fails."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = plan.function()
    constants = plan.constants_for(architecture, tile)
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind, _, divisor = plan.arguments[name].partition(":")
        signature[name] = kind
        if divisor:
            attributes[(place,)] = [["tt.divisibility", int(divisor)]]
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})
    shared = built.metadata.shared
    registers, spills, loop, listing = _of_amd(built.asm["amdgcn"]) if amd else _of_nvidia(built.asm["cubin"])
    counts = {
        group: sum(n for name, n in listing.items() if re.match(pattern or MATRIX_INSTRUCTIONS[architecture], name))
        for group, pattern in _GROUPS.items()
    }
    programs = _programs(architecture, registers, shared, tile.warps)
    kinds = [name for name, _ in listing.most_common() if re.match(MATRIX_INSTRUCTIONS[architecture], name)]
    kind = re.split(r"[._]\d|\.", kinds[0])[0] if kinds else ""
    figures = registers, shared, spills, tile.warps, programs, counts, kind, loop
    return Compiled(plan.name, architecture, str(tile), *figures)


def _programs(architecture: str, registers: int, shared: int, warps: int) -> int:
    threads = warps * _THREADS.get(architecture, 32)
    by_registers = _REGISTERS[architecture] // (max(registers, 16) * threads)
    by_shared = _SHARED_PER_MULTIPROCESSOR[architecture] // (shared + 1024)
    return max(1, min(by_registers, by_shared, _MAX_THREADS // threads, 32))


def _of_nvidia(binary: bytes) -> tuple[int, int, int, collections.Counter[str]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    # The stack of a kernel without calls holds spilled registers only.
    spills = sum(int(n) for n in re.findall(r"STACK:(\d+)", usage))
    names, loop = _instructions(listing)
    return registers, spills, loop, collections.Counter(names)


_LINE = re.compile(
    r"^\s*(?P<label>\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)(?P<rest>.*)"
)


def _instructions(listing: str) -> tuple[list[str], int]:
    """Return the names of all instructions, and the number of those in the largest loop without a loop inside."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for match in filter(None, map(_LINE.match, listing.splitlines())):
        if match["label"]:
            labels[match["label"]] = len(names)
            continue
        names.append(match["name"])
        target = re.search(r"\.L\w+", match["rest"]) if match["name"].startswith("BRA") else None
        if target and target[0] in labels:  # backwards
            loops.append((labels[target[0]], len(names)))
    innermost = [
        one for one in loops if not any(other != one and one[0] <= other[0] and other[1] <= one[1] for other in loops)
    ]
    return names, max((end - begin for begin, end in innermost), default=0)


def _of_amd(assembly: str) -> tuple[int, int, int, collections.Counter[str]]:
    def figure(name: str) -> int:
        return sum(int(n) for n in re.findall(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE))

    names = re.findall(r"^\s+([a-z]\w+)\s", assembly, re.MULTILINE)
    return figure("vgpr_count"), figure("private_segment_fixed_size"), 0, collections.Counter(names)


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
