"""Short causal convolutions: one filter per channel over the newest tokens, followed by SiLU (arXiv 2405.21060, section
7; Mamba-2 and Kimi Delta Attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.causal_conv import cpu, reference

__all__ = ["BACKENDS", "backend_for", "causal_conv"]

BACKENDS = {"reference": reference, "cpu": cpu}


def backend_for(x: Tensor) -> str:
    """Return the backend for x. The ``cpu`` backend has a backward pass."""
    return "cpu" if native.serves(x, backward=True) else "reference"


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    tail: Tensor | None = None,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``silu(bias + sum over k of weight[:, k] * x[t - K + 1 + k])`` for every token t, and the next tail.

    Args:
        x: float32 or float64 [B, S, C].
        weight: [C, K] with K >= 2. The last column multiplies the token itself.
        bias: [C], or None for zeros.
        tail: [B, K - 1, C], the tokens before x, or None for zeros.
        positions: int64 [B, S], each token's position in its packed document, or None. Earlier documents do not
            contribute.

    Returns:
        The output [B, S, C], and the last K - 1 tokens of tail and x, [B, K - 1, C].
    """
    out = get_backend(BACKENDS, backend or backend_for(x)).causal_conv(x, weight, bias, tail, positions)
    kept = weight.shape[1] - 1
    if x.shape[1] >= kept:
        return out, x[:, x.shape[1] - kept :]
    before = x.new_zeros(x.shape[0], kept, x.shape[2]) if tail is None else tail
    return out, torch.cat((before[:, x.shape[1] :], x), dim=1)
