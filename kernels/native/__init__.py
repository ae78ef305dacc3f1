"""Native CPU operators: the ``cpu.cpp`` twins of the operations, loaded from a cache of compiled libraries.

``make`` builds them (:mod:`kernels.native.build`). Where there is no library, PyTorch's operators run instead.
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
    """The instruction set of the operators that run, such as ``avx512``; None where PyTorch's run instead.

    The first call loads the library, and logs one line where there is none to load.
    """
    levels = supported_levels()
    if not levels:
        _log.warning(
            "native CPU operators: no AVX2 on this processor, or none allowed; PyTorch's operators run instead"
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
    """Load the library. Return a sentence on why it cannot be trusted or loaded, or None."""
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


def serves(x: Tensor, backward: bool = False) -> bool:
    """Return whether native operators accept ``x``: float32 on a CPU and, unless the operator has a ``backward`` pass,
    gradients disabled."""
    return x.is_cpu and x.dtype == torch.float32 and (backward or not torch.is_grad_enabled()) and level() is not None


@functools.cache
def op(name: str) -> torch._ops.OpOverload:
    """The operator ``fiftyfold::<name>``."""
    level()
    return getattr(torch.ops.fiftyfold, name).default


def in_huge_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy contiguous CPU tensors into 2 MiB pages (Linux), which a CPU reads up to twice as fast. Without native
    operators, return them unchanged."""
    if not tensors or not all(x.is_cpu for x in tensors) or level() is None:
        return list(tensors)
    with torch.inference_mode(False):  # a parameter must not be an inference tensor
        return op("in_huge_pages")([x.detach() for x in tensors])
