"""The gated delta rule with a decay per channel (Kimi Delta Attention, arXiv 2510.26692, equation 1).

Every head has a state of K x V numbers, which maps keys to values. A token scales each of its K rows by a decay, moves
the value of the token's key towards the token's value, and reads the value of the token's query::

    state[t] = exp(g[t]) * state[t - 1]
    state[t] += outer(k[t], beta[t] * (v[t] - state[t].T @ k[t]))
    out[t] = state[t].T @ q[t]

The ``reference`` backend computes one token after another, and so does ``cpu``. The ``eager`` backend multiplies
matrices within chunks of tokens and carries the state between chunks; ``triton`` does the same on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.gated_delta_rule import cpu, eager, reference, triton
from kernels.gated_delta_rule.batch_invariant import scan_in_fixed_order
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "gated_delta_rule", "scan_in_fixed_order"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(q: Tensor) -> str:
    """Return the backend for q. The ``cpu`` backend has no gradients; without them it is the fastest for any length."""
    if can_run(q) and triton.supports(q):
        return "triton"
    return "cpu" if native.serves(q) else "eager"


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the rule over S tokens of every sequence.

    Args:
        q: float32 or float64 [B, S, H, K], queries, already scaled.
        k: [B, S, H, K], keys of length 1 or less. With longer keys the state may grow without bound.
        v: [B, S, H, V], values.
        g: [B, S, H, K], logarithms of the decays, 0 or less.
        beta: [B, S, H], step sizes from 0 to 1.
        state: [B, H, K, V] before the first token, or None for zeros.
        positions: int64 [B, S], each token's position in its packed document, or None. The state starts at zero in
            every document that begins in the row.
        chunk_size: Tokens per chunk of the ``eager`` backend, a power of two.

    Returns:
        out [B, S, H, V], and the state after the last token, [B, H, K, V].
    """
    return get_backend(BACKENDS, backend or backend_for(q)).gated_delta_rule(
        q, k, v, g, beta, state, positions, chunk_size
    )
