"""Availability of Triton, and checks of the arguments of Triton backends."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from operator import contains

import torch
from torch import Tensor

NVIDIA = ("sm_80", "sm_90", "sm_100")
ARCHITECTURES = (*NVIDIA, "gfx942")
"""Architectures with tile settings. Others have less shared memory than the tiles need."""
_CAPABILITIES = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}
_debug = False


@functools.cache
def is_installed() -> bool:
    """Return whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on CPU tensors: ``TRITON_INTERPRET=1``.

    It must be set before triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def architecture(device: torch.device) -> str | None:
    """Return the member of :data:`ARCHITECTURES` that a GPU belongs to, or None."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in ARCHITECTURES else None
    return _CAPABILITIES.get(torch.cuda.get_device_capability(device))


def can_run(x: Tensor) -> bool:
    """Return whether Triton kernels run on the device of ``x`` without the interpreter."""
    return x.is_cuda and is_installed() and not is_interpreting() and architecture(x.device) is not None


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context that makes the GPU of ``x`` current. Triton launches kernels on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU, or a small number for the interpreter."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def float32_precision() -> str:
    """Return Triton's name of the precision of float32 products: three TF32 products where the GPU has them."""
    return "ieee" if is_interpreting() or torch.version.hip is not None else "tf32x3"


def split_precision() -> str:
    """Return Triton's name of the precision of float32 products as three products of BF16 numbers, two per operand."""
    return "ieee" if is_interpreting() else "bf16x3"


def as_rows(x: Tensor) -> Tensor:
    """Return x [B, S, ...] as contiguous rows [B * S, ...] at even distances, ``stride(0)``. Copies it only if it is no
    such view."""
    rows = x.flatten(0, 1)
    return rows if rows[0].is_contiguous() else rows.contiguous()


def require_device(operation: str, x: Tensor) -> None:
    """Raise ValueError if kernels cannot run on the device of ``x``."""
    if not is_installed():
        raise ValueError(f"{operation}: the triton backend requires the triton package, which is not installed")
    if is_interpreting():
        if not x.is_cpu:
            raise ValueError(f"{operation}: Triton's interpreter requires tensors on the CPU, found {x.device}")
    elif not x.is_cuda:
        raise ValueError(f"{operation}: the triton backend requires tensors on a GPU, found {x.device}")
    elif architecture(x.device) is None:
        found = torch.cuda.get_device_name(x.device)
        raise ValueError(f"{operation}: the triton backend supports {', '.join(ARCHITECTURES)}; found {found}")


def require_choice(operation: str, what: str, found: object, supported: tuple) -> None:
    """Raise ValueError that names the supported values if ``found`` is none of them."""
    if found not in supported:
        names = ", ".join(str(x).removeprefix("torch.") for x in supported)
        raise ValueError(
            f"{operation}: the triton backend supports {what} {names}; found {str(found).removeprefix('torch.')}"
        )


Shape = tuple["int | tuple[int, ...]", ...]
"""Sizes of a tensor. A tuple permits several."""


def require_shapes(operation: str, **tensors: tuple[Tensor | None, Shape]) -> None:
    """Raise ValueError for the first tensor of another shape, beyond whose end kernels might read. None passes."""
    for name, (x, sizes) in tensors.items():
        permitted = [size if isinstance(size, tuple) else (size,) for size in sizes]
        if x is None or (x.dim() == len(sizes) and all(map(contains, permitted, x.shape))):
            continue
        expected = ", ".join(" or ".join(map(str, dict.fromkeys(size))) for size in permitted)
        raise ValueError(f"{operation}: {name} must have the shape [{expected}], found {list(x.shape)}")


@contextlib.contextmanager
def checked_selections() -> Iterator[None]:
    """Context manager for debugging: Triton backends raise IndexError for selections that are out of range.

    Without it, kernels ignore such a selection, because the check synchronizes with the CPU.
    """
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before


def check_selection(operation: str, chosen: Tensor, entries: int | Tensor) -> None:
    """Within :func:`checked_selections`, raise IndexError if one of ``chosen`` is neither -1 nor an entry.

    ``entries`` is the number of entries, or a tensor of limits that broadcasts with ``chosen``.
    """
    if not _debug or not chosen.numel():
        return
    wrong = ((chosen < -1) | (chosen >= entries)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        limit = entries if isinstance(entries, int) else int(entries.expand_as(chosen)[place])
        raise IndexError(f"{operation}: selection {list(place)} is {int(chosen[place])}, of {limit} entries")
