"""The state-space scan of Mamba-2 (state-space duality, arXiv 2405.21060).

Every head has a state of P x N numbers. A token scales it by a learned decay and adds an outer product::

    state[t] = exp(dt[t] * A) * state[t - 1] + dt[t] * outer(x[t], B[t])
    y[t] = state[t] @ C[t] + D * x[t]

The ``reference`` backend computes one token after another, and so does ``cpu``. The ``eager`` backend multiplies
matrices within chunks of tokens and carries the state between chunks (section 6 of the paper); ``triton`` does the same
on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.backends import get_backend
from kernels.ssd_scan import cpu, eager, reference, triton
from kernels.ssd_scan.batch_invariant import scan_in_fixed_order
from kernels.triton_support.platform import can_run

__all__ = ["BACKENDS", "backend_for", "scan_in_fixed_order", "ssd_scan"]

BACKENDS = {"reference": reference, "eager": eager, "cpu": cpu, "triton": triton}


def backend_for(x: Tensor) -> str:
    """Return the backend for x. The ``cpu`` backend has no gradients; without them it is the fastest for any length."""
    if can_run(x) and triton.supports(x):
        return "triton"
    return "cpu" if native.serves(x) else "eager"


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None = None,
    positions: Tensor | None = None,
    chunk_size: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan over S tokens of every sequence.

    Args:
        x: float32 or float64 [batch, S, H, P].
        dt: [batch, S, H], positive step sizes.
        A: [H], negative decay rates.
        B: [batch, S, G, N], inputs to the state. H / G consecutive heads share a group.
        C: [batch, S, G, N], outputs from the state.
        D: [H], the skip connection.
        state: [batch, H, P, N] before the first token, or None for zeros.
        positions: int64 [batch, S], each token's position in its packed document, or None. The state starts at zero in
            every document that begins in the row.
        chunk_size: Tokens per chunk of the ``eager`` backend.

    Returns:
        y [batch, S, H, P], and the state after the last token, [batch, H, P, N].
    """
    return get_backend(BACKENDS, backend or backend_for(x)).ssd_scan(x, dt, A, B, C, D, state, positions, chunk_size)
