"""Recording of the operators that a function calls on a CPU, which are then repeated without Python.

The operators may be native ones or PyTorch's. :mod:`model.decode_graphs` records decode steps, of which Python takes a
third.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native


class Recorded(NamedTuple):
    """A function that has run once and was recorded meanwhile."""

    result: Tensor
    replay: Callable[[], Tensor] | None
    """Repeats the function and returns its new result. None if it cannot be repeated."""
    refusal: str = ""
    """Why it cannot be repeated."""


def record(function: Callable[[], Tensor]) -> Recorded:
    """Run a function and record the operators that it calls in this thread.

    A repetition sees new values in tensors that exist outside the function, and writes to such tensors. Everything else
    that Python computes is repeated as it was, such as numbers, shapes and branches. Functions are refused if an
    operator returns a number to Python or a tensor whose shape depends on values, or reads a tensor that Python made
    from a list meanwhile. ``Tensor.tolist`` and conversions from and to NumPy are not noticed.

    Raises RuntimeError if native operators are not available.
    """
    if native.level() is None:
        raise RuntimeError("native CPU operators: recordings are not available; install g++ and run `make native`")
    calls = torch.classes.fiftyfold.RecordedCalls()
    calls.begin()
    try:
        result = function()
    finally:
        calls.end()
    refusal = calls.finish(result)
    return Recorded(result, None if refusal else calls.replay, refusal)
