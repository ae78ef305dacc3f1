"""Attention within whole sequences: a sliding window, compressed entries and a sink in one softmax (report 2.3.3).

:mod:`kernels.paged_attention` computes it over the packed rows of a cache. :class:`TiledAttention` computes it tile by
tile, for results that do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import get_backend
from kernels.chosen_rows import chosen_mask
from kernels.entry_ranges import EntryRanges
from kernels.sparse_attention import eager, gathered, reference, triton
from kernels.sparse_attention.batch_invariant import INVARIANT_TILE, TiledAttention
from kernels.sparse_attention.mass import EntryMass, StoredMass
from kernels.sparse_attention.triton import deterministic_gradients
from kernels.triton_support.platform import can_run

__all__ = [
    "BACKENDS",
    "INVARIANT_TILE",
    "EntryMass",
    "StoredMass",
    "TiledAttention",
    "backend_for",
    "deterministic_gradients",
    "sparse_attention",
]

BACKENDS = {"reference": reference, "eager": eager, "triton": triton}


def backend_for(
    query: Tensor,
    window_kv: Tensor | None,
    entries: Tensor | None,
    value_size: int | None = None,
    chosen: Tensor | None = None,
    entry_mask: Tensor | EntryRanges | None = None,
) -> str:
    """Return the backend. ``eager`` supports neither past tokens nor entries gathered per query, and runs on CPUs,
    except for ``chosen`` entries without a window, which it gathers on any device. ``triton`` supports no entries
    gathered per query, and ranges in place of a mask."""
    has_mask = isinstance(entry_mask, Tensor)
    if can_run(query) and not has_mask and triton.supports(query, entries, value_size or query.shape[-1]):
        return "triton"
    if chosen is not None and window_kv is None and query.dtype.itemsize <= 4:
        return "eager"
    has_no_past = window_kv is None or window_kv.shape[1] == query.shape[1]
    is_supported = has_no_past and (entries is None or entries.dim() == 3)
    return "eager" if is_supported and query.is_cpu and query.dtype.itemsize <= 4 else "reference"


def sparse_attention(
    query: Tensor,
    window_kv: Tensor | None,
    entries: Tensor | None,
    entry_mask: Tensor | EntryRanges | None,
    sink: Tensor | None,
    window: int = 0,
    reach: Tensor | None = None,
    scale: float | None = None,
    value_size: int | None = None,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, EntryMass | None]:
    """Attend to the last ``window`` tokens, the permitted entries, and a sink that has no value.

    One vector is both key and value. Time grows with S * (window + T). Except in ``triton``, the mask and the returned
    mass take memory that grows with S * T.

    Args:
        query: [B, S, H, c].
        window_kv: [B, P + S, c], with P <= window - 1 past tokens followed by the tokens of the queries; or None to
            attend to entries alone. Every query must then have a permitted one.
        entries: [B, T, c], shared by all queries; [B, S, K, c], gathered per query; or None.
        entry_mask: bool [B or 1, S, T or K], True for permitted entries, or their ranges; None without entries. Not
            read with ``chosen``.
        sink: [H], logits; or None.
        window: Tokens that a query attends to, including itself; 0 without ``window_kv``.
        reach: int64 [B, S], a smaller limit than ``window`` for single queries, for packed documents; or None.
        scale: Softmax scale, by default ``c ** -0.5``.
        value_size: Values are the first dims of a vector, by default all.
        chosen: int [B, S, K], indices of the permitted ``entries`` [B, T, c] of every query, each at most once; -1 in
            unused slots. Instead of ``entry_mask``. Without ``window_kv``, and for the ``triton`` backend, time does
            not grow with T.

    Returns:
        The output [B, S, H, value_size] and the attention mass of the entries, [B, S, T], with ``chosen`` [B, S, K], or
        None without entries. The ``triton`` backend computes the mass when it is read, for the queries that are read.
    """
    c = query.shape[-1]
    if sink is None:
        sink = query.new_full(query.shape[2:3], float("-inf"), dtype=torch.float32)
    scale = c**-0.5 if scale is None else scale
    name = backend or backend_for(query, window_kv, entries, value_size, chosen, entry_mask)
    if name == "triton":
        return triton.sparse_attention(
            query, window_kv, entries, entry_mask, sink, window, reach, scale, value_size or c, chosen
        )
    if entries is None:
        chosen = None
    elif chosen is not None:
        if name == "eager" and window_kv is None:
            out, mass = gathered.sparse_attention(query, entries, chosen, sink, scale, value_size or c)
            return out, StoredMass(mass)
        entry_mask = chosen_mask(chosen, entries.shape[1])
    elif isinstance(entry_mask, EntryRanges):
        entry_mask = entry_mask.mask(entries.shape[1])
    out, mass = get_backend(BACKENDS, name).sparse_attention(
        query, window_kv, entries, entry_mask, sink, window, reach, scale, value_size or c
    )
    if mass is not None and chosen is not None:
        mass = mass.gather(-1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, 0.0)
    return out, None if mass is None else StoredMass(mass)
