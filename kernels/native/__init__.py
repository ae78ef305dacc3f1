"""Native CPU operators: the sources ``kernels/<op>/cpu.cpp``, compiled into a cached library.

:mod:`kernels.native.build` compiles them, as part of ``make``. Without a library, the PyTorch backends run instead.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.native.levels import library_path, supported_levels

_log = logging.getLogger("fiftyfold")


@functools.cache
def level() -> str | None:
    """Return the instruction set of the native operators, such as ``avx512``, or None if they are not available.

    The first call loads the library. It logs one line if there is none.
    """
    levels = supported_levels()
    if not levels:
        _log.warning(
            "native CPU operators: this processor has neither AVX2 nor NEON, or they are disabled; PyTorch's operators "
            "run instead"
        )
        return None
    refused = False
    for name in levels:
        path = library_path(name)
        if path.exists():
            fault = _fault(path)
            if fault is None:
                return name
            _log.warning("native CPU operators: %s: %s; delete it and run `make native`", path, fault)
            refused = True
    if refused:
        return None
    _log.warning(
        "native CPU operators: not built for these sources; PyTorch's operators run instead, several times slower. "
        "Install g++ and run `make native`."
    )
    return None


def _fault(path: Path) -> str | None:
    """Load the library. Return the reason if it cannot be trusted or loaded, else None."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid not in (0, os.getuid()):
            return "belongs to another user"
        expected = path.with_name(path.name + ".sha256").read_text()
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            return "is damaged"
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"cannot be loaded ({error.strerror or str(error).splitlines()[0]})"
    return None


def serves(x: Tensor, backward: bool = False, bf16: bool = False) -> bool:
    """Return whether native operators accept ``x``: float32 on a CPU, with gradients disabled.

    Set ``backward`` for operators with a backward pass, which also accept enabled gradients, and ``bf16`` for operators
    that also accept BF16.
    """
    supported = x.dtype == torch.float32 or (bf16 and x.dtype == torch.bfloat16)
    return x.is_cpu and supported and (backward or not torch.is_grad_enabled()) and level() is not None


@functools.cache
def op(name: str) -> torch._ops.OpOverload:
    """Return the operator ``fiftyfold::<name>``. Raises RuntimeError if native operators are not available."""
    if level() is None:
        raise RuntimeError(f"native CPU operators: '{name}' is not available; install g++ and run `make native`")
    return getattr(torch.ops.fiftyfold, name).default


def in_huge_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy contiguous CPU tensors into 2 MiB pages (Linux), which a CPU reads up to twice as fast.

    Returns the tensors unchanged if native operators are not available or a tensor is on another device.
    """
    if not tensors or not all(x.is_cpu for x in tensors) or level() is None:
        return list(tensors)
    with torch.inference_mode(False):  # a parameter must not be an inference tensor
        return op("in_huge_pages")([x.detach() for x in tensors])
