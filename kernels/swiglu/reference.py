"""SwiGLU in eager PyTorch (report 4.2.3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, limit: float, gain: Tensor | None = None) -> Tensor:
    """``silu(gate) * up * gain``, gate clamped from above and up on both sides to ``limit``.

    gate and up [..., n], gain [..., 1]. Computed in float32, given in gate's dtype. At the limit a gradient passes.
    """
    out = F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)
    return (out if gain is None else out * gain).to(gate.dtype)
