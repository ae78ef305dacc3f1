"""SwiGLU by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """:func:`kernels.swiglu.reference.swiglu` for float32 inputs without gradients and without a gain."""
    if gain is not None:
        raise ValueError("swiglu: the cpu backend takes no gain")
    return native.op("swiglu")(gate, up, limit)
