"""SwiGLU by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.swiglu.swiglu` for float32, without gradients. Raises ValueError for a gain."""
    if gain is not None:
        raise ValueError("swiglu: the cpu backend does not support a gain")
    return native.op("swiglu")(gate, up, limit)
