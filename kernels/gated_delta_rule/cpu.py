"""The gated delta rule by a native operator, one token after another."""

from __future__ import annotations

from torch import Tensor

from kernels import native


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`kernels.gated_delta_rule.gated_delta_rule` for float32, without gradients. ``chunk_size``
    changes nothing."""
    return native.op("gated_delta_rule")(q, k, v, g, beta, state, positions)
