"""Routing by a native operator."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def route(
    logits: Tensor,
    bias: Tensor,
    k: int,
    scale: float,
    chosen: Tensor | None = None,
    scoring: str = "sqrtsoftplus",
    groups: int = 1,
    groups_per_token: int = 1,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.routing.route` without gradients."""
    return native.op("route")(logits, bias, chosen, k, scale, scoring == "sigmoid", groups, groups_per_token)
