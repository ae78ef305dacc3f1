"""Routing by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def route(logits: Tensor, bias: Tensor, k: int, scale: float, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.routing.route` without gradients."""
    return native.op("route")(logits, bias, chosen, k, scale)
