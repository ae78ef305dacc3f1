"""Attention within whole sequences: a sliding window, compressed entries and a sink in one softmax (report 2.3.3).

:mod:`kernels.paged_attention` computes it over the packed rows of a cache. :class:`TiledAttention` computes it tile by
tile, for results that do not depend on the batch.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backends import get_backend
from kernels.sparse_attention import eager, reference
from kernels.sparse_attention.batch_invariant import INVARIANT_TILE, TiledAttention

__all__ = ["BACKENDS", "INVARIANT_TILE", "TiledAttention", "backend_for", "sparse_attention"]

BACKENDS = {"reference": reference, "eager": eager}


def backend_for(query: Tensor, window_kv: Tensor, entries: Tensor | None) -> str:
    """Return the backend. ``eager`` supports neither past tokens nor entries gathered per query."""
    is_supported = window_kv.shape[1] == query.shape[1] and (entries is None or entries.dim() == 3)
    return "eager" if is_supported and query.is_cpu and query.dtype.itemsize <= 4 else "reference"


def sparse_attention(
    query: Tensor,
    window_kv: Tensor,
    entries: Tensor | None,
    entry_mask: Tensor | None,
    sink: Tensor,
    window: int,
    reach: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the last ``window`` tokens, the permitted entries, and a sink that has no value.

    One vector is both key and value. The softmax scale is ``c ** -0.5``. Time and memory grow with S * window, not with
    S * S.

    Args:
        query: [B, S, H, c].
        window_kv: [B, P + S, c], with P <= window - 1 past tokens followed by the tokens of the queries.
        entries: [B, T, c], shared by all queries; [B, S, K, c], gathered per query; or None.
        entry_mask: bool [B or 1, S, T or K], True for permitted entries; None without entries.
        sink: [H], logits.
        window: Tokens that a query attends to, including itself.
        reach: int64 [B, S], a smaller limit than ``window`` for single queries, for packed documents; or None.

    Returns:
        The output [B, S, H, c] and the attention mass of the entries, summed over heads: [B, S, T or K], or None
        without entries. The mass has no gradient.
    """
    return get_backend(BACKENDS, backend or backend_for(query, window_kv, entries)).sparse_attention(
        query, window_kv, entries, entry_mask, sink, window, reach
    )
