"""Experts of few tokens by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def fused_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
) -> Tensor:
    """Implement :func:`kernels.fused_experts.fused_experts` without gradients."""
    return native.op("fused_experts")(x, chosen, weights, *stacks, list(shared), limit)
