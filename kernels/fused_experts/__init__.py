"""Routed and shared experts of few tokens in one operation, for decoding.

More tokens are faster with :mod:`kernels.expert_dispatch` and one matrix product per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.fused_experts import cpu, reference
from kernels.linear import supports_weight

__all__ = ["BACKENDS", "MAX_TOKENS", "backend_for", "fused_experts", "prefers_fused"]

BACKENDS = {"reference": reference, "cpu": cpu}
MAX_TOKENS = 64
"""Maximum number of tokens for which the ``cpu`` backend is the faster choice."""


def backend_for(x: Tensor) -> str:
    """Return the backend for tokens x."""
    return "cpu" if native.serves(x) else "reference"


def prefers_fused(x: Tensor, w1: Tensor) -> bool:
    """Return whether :func:`fused_experts` is the faster choice for tokens x [..., d] and experts w1 [E, inner, d].

    That is the case for few tokens of the ``cpu`` backend, whose time is bound by reading the weights of the chosen
    experts.
    """
    is_small = x.numel() <= MAX_TOKENS * x.shape[-1]
    is_supported = supports_weight(w1) and not torch.is_autocast_enabled("cpu")
    return is_small and is_supported and native.serves(x)


def fused_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
    backend: str | None = None,
) -> Tensor:
    """Return the weighted sum of the SwiGLUs of each token's experts. No gradient with the ``cpu`` backend.

    Weight matrices are float32, BF16, or rows packed by :func:`kernels.cache_io.pack` with ``EntryLayout(n, "fp4")``:
    uint8, with the packed bytes of the n inputs in the last dim. Packed inputs must be multiples of 32.

    Args:
        x: float32 [..., d].
        chosen: int64 [..., K], the experts of every token.
        weights: float32 [..., K], their weights.
        stacks: w1 and w3 [E, inner, d] and w2 [E, d, inner] of the routed experts.
        shared: w1 and w3 [inner', d] and w2 [d, inner'] of an expert that every token uses with weight 1; or empty.
        limit: Clamping bound of :func:`kernels.swiglu.swiglu`.

    Returns:
        float32 [..., d].

    Raises:
        ValueError: If shapes or dtypes do not match (``cpu``).
        IndexError: If ``chosen`` names an expert that does not exist.
    """
    return get_backend(BACKENDS, backend or backend_for(x)).fused_experts(x, chosen, weights, stacks, shared, limit)
