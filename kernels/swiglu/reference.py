"""SwiGLU in PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """Implement :func:`kernels.swiglu.swiglu`."""
    out = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    return (out if gain is None else out * gain).to(gate.dtype)
