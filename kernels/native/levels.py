"""Instruction sets of the native operators, and the paths of their libraries."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

import torch

from kernels.cache_folder import cache_folder

_ROOT = Path(__file__).parent.parent

FLAGS: dict[str, list[str]] = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "neon": ["-march=armv8-a"],
}
"""Compiler flags of every level. The sources choose their vectors by the macros that these define."""


def supported_levels() -> list[str]:
    """Return the levels that this processor supports, fastest first; none on an unknown processor.

    The environment variable ``ATEN_CPU_CAPABILITY`` (``avx2``, ``default``) limits them on x86, as it limits the
    kernels of PyTorch. All 64-bit ARM processors have NEON.
    """
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ["neon"]
    if machine in ("x86_64", "amd64"):
        return {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(torch.backends.cpu.get_cpu_capability(), [])
    return []


@functools.cache
def source_hash() -> str:
    """Return a digest of the sources, the compiler flags and the version of PyTorch."""
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode())
    for source in sorted([*_ROOT.glob("*/*.cpp"), *_ROOT.glob("*/*.h"), _ROOT / "native" / "build.py"]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def library_path(level: str) -> Path:
    """Return the path of the library for one level."""
    return cache_folder("native") / source_hash() / f"{level}.so"
