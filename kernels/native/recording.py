"""Record the operators that a function calls on a CPU, and replay them without Python.

The operators may be native ones or PyTorch's. :mod:`model.decode_graphs` records decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native


class Recorded(NamedTuple):
    """The result of :func:`record`."""

    result: Tensor
    """Result of the function."""
    replay: Callable[[], Tensor] | None
    """Replay the function and return its new result. None if it cannot be replayed."""
    refusal: str = ""
    """Reason why the function cannot be replayed, or an empty string."""


def record(function: Callable[[], Tensor]) -> Recorded:
    """Run a function once and record the operators that it calls in this thread.

    A replay reads and writes tensors that exist outside the function. Numbers, shapes and branches that Python computes
    keep their recorded values. The function cannot be replayed if an operator returns a number to Python, if Python
    reads the values of a tensor or makes a tensor from values, or if the shape of a result depends on values.
    ``Tensor.data`` and copies of tensors by ``copy`` are not noticed.

    Args:
        function: Returns one tensor, the result of an operator.

    Raises:
        RuntimeError: If native operators are not available, or another recording is active in this thread.
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
