"""Instruction sets of the native operators, and the paths of their libraries."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from pathlib import Path

import torch

_ROOT = Path(__file__).parent.parent

FLAGS: dict[str, list[str]] = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "neon": ["-march=armv8-a"],
}
"""Compiler flags by level, best first."""


def supported_levels() -> list[str]:
    """Levels that this processor can run, best first; empty where there is none.

    The variable ``ATEN_CPU_CAPABILITY`` (avx2, default), which limits PyTorch's own kernels, limits these as well.
    """
    if platform.machine() in ("aarch64", "arm64"):
        return ["neon"]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(capability, [])


@functools.cache
def source_hash() -> str:
    """Digest of all that a library is made from: sources, flags and PyTorch's version."""
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode())
    for source in sorted([*_ROOT.glob("*/*.cpp"), *_ROOT.glob("*/*.h"), _ROOT / "native" / "build.py"]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """``fiftyfold/native`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fiftyfold" / "native"


def library_path(level: str) -> Path:
    """Path of the library of one level."""
    return cache_folder() / source_hash() / f"{level}.so"
