"""Routing, and the experts of a few tokens, by native operators."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def route(logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`kernels.expert_dispatch.reference.route` without gradients."""
    return native.op("route")(logits, bias, chosen, k, scale)


def few_tokens(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    stacks: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    limit: float,
) -> Tensor:
    """:func:`kernels.expert_dispatch.reference.few_tokens`, without a gradient."""
    return native.op("experts")(x, chosen, weights, *stacks, list(shared), limit)
